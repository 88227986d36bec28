"""ATen lowerings by family. Importing the package registers them."""
