"""The CUDA backend: Triton kernels, and the library's products where there are.

``backend`` has the class; nothing here is imported with the package, which needs no Triton then.
"""
