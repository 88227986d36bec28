// Sorting, filtering and walking through the table. Without them it is in graph order.
// number(row, column): what a column of numbers sorts by; facet(row, name): what a filter compares;
// words(row): what is searched besides what is seen.
const startTable = (table, { number, facet, words = () => "" } = {}) => {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const headers = [...table.tHead.rows[0].cells];
  const controls = [...document.querySelectorAll(".controls input, .controls select")]
    .filter((control) => control.closest(".controls").querySelector("#shown"));
  const search = controls.find((control) => control.type === "search");
  const shown = document.getElementById("shown");
  const texts = rows.map((row, index) => `${row.textContent} ${words(index)}`.toLowerCase());
  let order = rows.map((_, index) => index);

  const cellKey = (row, column) => {
    const cell = rows[row].cells[column];
    if (cell.dataset.value === undefined) return cell.textContent.toLowerCase();
    return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  };
  const key = (row, column) => {
    const header = headers[column];
    const value = number && header.classList.contains("number")
      ? number(row, header.dataset.column) ?? fromText(rows[row].cells[column].textContent)
      : cellKey(row, column);
    return Number.isNaN(value) ? null : value;
  };
  const fromText = (text) => (/^-?\d/.test(text) ? Number(text) : null);

  const sort = (column) => {
    const header = headers[column];
    const descending = header.getAttribute("aria-sort") === "ascending";
    headers.forEach((other) => other.setAttribute("aria-sort", "none"));
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const sign = descending ? -1 : 1;
    order = rows.map((_, row) => [key(row, column), row]).sort(([a, i], [b, j]) => {
      if (a === null || b === null) return (a === null) - (b === null) || i - j; // unmeasured last
      return a < b ? -sign : a > b ? sign : i - j;
    }).map(([, row]) => row);
    body.append(...order.map((row) => rows[row]));
  };

  const passes = (row, control) => {
    const wanted = control.value;
    if (wanted === "") return true;
    const value = facet ? facet(row, control.name) : rows[row].dataset[control.name];
    return control.tagName === "SELECT" ? value === wanted : (value ?? "").startsWith(wanted);
  };
  const filter = () => {
    const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const others = controls.filter((control) => control !== search);
    let count = 0;
    rows.forEach((row, index) => {
      const keep = wanted.every((word) => texts[index].includes(word)) &&
        others.every((control) => passes(index, control));
      row.hidden = !keep;
      count += keep;
    });
    shown.textContent = `${count} of ${rows.length} ${table.dataset.noun ?? "tensors"}`;
    body.dispatchEvent(new CustomEvent("filtered"));
  };

  headers.forEach((header, column) =>
    header.querySelector("button").addEventListener("click", () => sort(column)));
  controls.forEach((control) => control.addEventListener("input", filter));
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest?.("input, select, textarea");
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      search.focus();
    }
  });
  filter();
  return {
    rows, search, filter,
    visible: () => order.filter((row) => !rows[row].hidden),
  };
};

// One row's link is in the tab order; the arrow keys move among the rows that are shown.
const startWalking = (table, body) => {
  const links = table.rows.map((row) => row.querySelector("a"));
  let current = 0;
  const select = (row) => {
    links[current].tabIndex = -1;
    current = row;
    links[current].tabIndex = 0;
  };
  links.forEach((link) => { link.tabIndex = -1; });
  const entry = () => {
    const visible = table.visible();
    if (visible.length && table.rows[current].hidden) select(visible[0]);
  };
  if (links.length) select(0);
  body.addEventListener("filtered", entry);
  body.addEventListener("focusin", (event) => {
    const row = links.indexOf(event.target);
    if (row >= 0) select(row);
  });
  body.addEventListener("keydown", (event) => {
    const row = links.indexOf(event.target);
    if (row < 0) return;
    const visible = table.visible();
    const place = visible.indexOf(row);
    const target = { ArrowDown: place + 1, ArrowUp: place - 1, PageDown: place + 10,
      PageUp: place - 10, Home: 0, End: visible.length - 1 }[event.key];
    if (target === undefined) return;
    event.preventDefault();
    links[visible[Math.max(0, Math.min(visible.length - 1, target))]].focus();
  });
};
