// A page with nothing but a table.
{
  const table = document.getElementById("tensors");
  if (table) startTable(table);
}
