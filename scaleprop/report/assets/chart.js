// What both kinds of charts share: ticks of axes in powers of two, and a table of the same numbers.

// Whole numbers from low to high, at most `most` of them, at a step of 1, 2, 4, 8, …
const wholeTicks = (low, high, most) => {
  let step = 1;
  while ((high - low) / step > most) step *= 2;
  const found = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high; tick += step) found.push(tick);
  return found;
};

// Round numbers (1, 2 or 5 times a power of ten) from low to high.
const roundTicks = (low, high, most) => {
  const rough = (high - low) / most || 1;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * unit).find((size) => size >= rough);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high + step / 1e6; n += 1) found.push(n * step);
  return found;
};

// A table that is filled when it is opened: charts for those who do not see them, or want numbers.
const dataTable = (summary, caption, heads, rows) => {
  const details = make("details", { class: "data" }, make("summary", {}, summary));
  details.addEventListener("toggle", () => {
    if (!details.open || details.querySelector("table")) return;
    details.append(make("div", { class: "scroll fit", tabindex: "0", role: "region",
      "aria-label": caption }, make("table", {},
      make("caption", { class: "unseen" }, caption),
      make("thead", { class: "plain" }, make("tr", {}, heads.map((head, place) =>
        make("th", { scope: "col", class: place ? "number" : null }, head)))),
      make("tbody", {}, rows().map((cells) => make("tr", {}, cells.map((cell, place) =>
        (place ? make("td", { class: "number" }, cell) : make("th", { scope: "row" }, cell)))))))));
  });
  return details;
};

const band = (kind, x, y, width, height) =>
  draw("rect", { class: kind, x: x.toFixed(1), y: y.toFixed(1), width: Math.max(width, 0).toFixed(1),
    height: Math.max(height, 0).toFixed(1) });

const label = (kind, x, y, anchor, text) =>
  draw("text", { class: kind, x: x.toFixed(1), y: y.toFixed(1), "text-anchor": anchor }, text);

const line = (kind, x1, y1, x2, y2) =>
  draw("line", { class: kind, x1: x1.toFixed(1), y1: y1.toFixed(1), x2: x2.toFixed(1),
    y2: y2.toFixed(1) });
