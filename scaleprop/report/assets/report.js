// A report: its table, its charts, and the panel of one tensor.
const startReport = async () => {
  const data = await readData();
  const element = document.getElementById("tensors");
  let table = null;
  if (element) {
    const rest = document.getElementById("rows"); // of a long table; escaped as the others are
    if (rest) element.tBodies[0].insertAdjacentHTML("beforeend", await inflated(rest));
    fillFilters(data);
    table = startTable(element, {
      number: (row, column) => data.get(column, row),
      facet: (row, name) => data.get(name, row) ?? (name === "format" ? "high" : ""),
      words: (row) => `${data.get("module", row) ?? ""} ${data.get("op", row) ?? ""}`,
    });
    table.rows.forEach((row, place) =>
      row.querySelector("a").setAttribute("href", fragmentOf(data, place)));
    startWalking(table, element.tBodies[0]);
  }
  const open = startPanel(data, {
    visible: () => table?.visible() ?? [],
    rowOf: (place) => (place < data.rows ? table?.rows[place] : null),
  });
  startDepth(data, open);
  element?.tBodies[0].addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (!row || event.target.closest("a") || String(getSelection())) return;
    open(table.rows.indexOf(row), row.querySelector("a"));
  });
  document.querySelectorAll("a[data-search]").forEach((link) =>
    link.addEventListener("click", () => {
      table.search.value = link.dataset.search;
      table.filter();
      table.search.focus();
    }));
  document.documentElement.dataset.ready = "";
};

// The choices of the filters are what the data has; a filter with one choice is left out.
function fillFilters(data) {
  const rows = [...Array(data.rows).keys()];
  for (const select of document.querySelectorAll(".controls[role=search] select")) {
    const values = rows.map((row) => data.get(select.name, row) ??
      (select.name === "format" ? "high" : "")).filter(Boolean);
    const choices = [...new Set(values)].sort();
    select.append(make("option", { value: "" }, "all"),
      ...choices.map((value) => make("option", { value },
        select.name === "op" ? shortOperator(value) : value)));
    select.closest("label").hidden = choices.length < 2;
  }
  const modules = new Set();
  for (const row of rows) {
    const parts = (data.get("module", row) ?? "").split(".").filter(Boolean);
    parts.forEach((_, count) => modules.add(parts.slice(0, count + 1).join(".")));
  }
  document.getElementById("modules").append(...[...modules].sort().map((value) =>
    make("option", { value })));
  document.querySelector(".controls input[name=module]").closest("label").hidden = !modules.size;
}

startReport();
