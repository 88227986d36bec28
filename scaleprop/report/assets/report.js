"use strict";
// Sorting and filtering of the tensor table. Without JavaScript the table is complete, in graph order.
(() => {
  const table = document.getElementById("tensors");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const headers = [...table.tHead.rows[0].cells];
  const controls = [...document.querySelectorAll(".controls input, .controls select")];
  const shown = document.getElementById("shown");

  const key = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.value === undefined) return cell.textContent.toLowerCase();
    return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  };

  const sort = (column) => {
    const header = headers[column];
    const descending = header.getAttribute("aria-sort") === "ascending";
    headers.forEach((other) => other.setAttribute("aria-sort", "none"));
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const sign = descending ? -1 : 1;
    const ordered = rows.map((row) => [key(row, column), row]).sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null); // unmeasured rows last
      return a < b ? -sign : a > b ? sign : 0;
    });
    body.append(...ordered.map(([, row]) => row));
  };

  const filter = () => {
    const words = controls[0].value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const keep = words.every((word) => text.includes(word)) &&
        controls.slice(1).every((c) => c.value === "" || row.dataset[c.name] === c.value);
      row.hidden = !keep;
      count += keep;
    }
    shown.textContent = `${count} of ${rows.length} ${table.dataset.noun ?? "tensors"}`;
  };

  headers.forEach((header, column) =>
    header.querySelector("button").addEventListener("click", () => sort(column)));
  controls.forEach((control) => control.addEventListener("input", filter));
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !controls.includes(document.activeElement)) {
      event.preventDefault();
      controls[0].focus();
    }
  });
  filter();
})();
