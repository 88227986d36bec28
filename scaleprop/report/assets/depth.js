// Charts through depth: each tensor's RMS, amax, kurtosis and SQNR in graph order, over a band of
// what its format represents. A chart is one stop of the tab key: arrow keys move its cursor.

const leftMargin = 54;
const rightMargin = 10;
const ownRange = "own";

// "model.layers.3" of "model.layers.3.mlp.up_proj": the path up to its first number.
const layerOf = (module) => /^(.*?\d+)(?:\.|$)/.exec(module ?? "")?.[1] ?? "";

// Neighbours in one layer: [{layer, first, count}]. What has no layer between two tensors of one
// layer is taken to be in it.
const runsOf = (given) => {
  const found = [];
  const next = [...given];
  for (let place = given.length - 2; place >= 0; place -= 1) next[place] ||= next[place + 1];
  let last = "";
  const layers = given.map((layer, place) => {
    if (layer) last = layer;
    return layer || (next[place] === last ? last : "");
  });
  layers.forEach((layer, place) => {
    if (found.at(-1)?.layer === layer) found.at(-1).count += 1;
    else found.push({ layer, first: place, count: 1 });
  });
  return found;
};

const startDepth = (data, open) => {
  const box = document.getElementById("charts");
  const range = document.getElementById("range");
  if (!box) return;
  const get = (name, item) => {
    const value = data.get(name, item);
    const record = value === null ? data.get("record", item) : null;
    return record === null ? value : data.get(name, record);
  };
  const parts = data.depth.map((part) => ({ ...part, series: seriesOf(part.items, get) }))
    .filter((part) => part.series.rms.some(isNumber) || part.series.sqnr.some(isNumber));
  if (!parts.length) {
    const section = box.closest("section");
    document.querySelector(`nav a[href="#${section.id}"]`)?.closest("li").remove();
    section.remove();
    return;
  }
  const owns = parts.some((part) => part.items.some((item) => ownBand(data, get, item)));
  if (owns) range.append(make("option", { value: ownRange }, "of each tensor's format and scale"));
  for (const name of Object.keys(data.plain)) {
    range.append(make("option", { value: name }, `of ${name}, without a scale`));
  }
  range.append(make("option", { value: "" }, "none"));
  if (!parts.some((part) => part.series.rms.some(isNumber))) range.closest(".controls").remove();
  const figures = parts.map((part) => new DepthFigure(data, part, get, open));
  box.append(...figures.map((figure) => figure.element));
  const redraw = () => figures.forEach((figure) => figure.render(range.value));
  range.addEventListener("change", redraw);
  let width = 0;
  new ResizeObserver(() => {
    if (Math.abs(box.clientWidth - width) < 2) return;
    width = box.clientWidth;
    redraw();
  }).observe(box);
};

const seriesOf = (items, get) => Object.fromEntries(
  ["rms", "amax", "predicted", "kurtosis", "sqnr"].map((name) =>
    [name, items.map((item) => get(name, item))]));

// What an item's own format represents with its own scales: [smallest, smallest normal, largest].
const ownBand = (data, get, item) => {
  const format = data.formats[get("format", item)];
  const [low, high] = [get("low", item), get("high", item)];
  if (!format || !isNumber(low) || !isNumber(high)) return null;
  return [format[0] * low, format[1] * low, format[2] * high];
};

class DepthFigure {
  constructor(data, part, get, open) {
    Object.assign(this, { data, part, get, open, place: 0 });
    this.plot = make("div", { class: "plot", tabindex: "0", role: "slider",
      "aria-label": `${part.title}: tensor`, "aria-orientation": "horizontal", "aria-valuemin": "1",
      "aria-valuemax": part.items.length, "aria-valuenow": "1", "aria-valuetext": this.spoken(0) });
    this.tip = make("div", { class: "tip", hidden: true });
    const columns = [["RMS", "rms"], ["predicted", "predicted"], ["amax", "amax"],
      ["kurtosis", "kurtosis"], ["SQNR dB", "sqnr"]]
      .filter(([, name]) => part.series[name].some((value) => value !== null));
    this.element = make("figure", { class: "depth" },
      make("h3", {}, part.title), this.legend(),
      make("div", { class: "frame" }, this.plot, this.tip),
      make("figcaption", {}, this.caption()),
      dataTable("Numbers of this chart", part.title,
        ["tensor", ...columns.map(([head]) => head)],
        () => part.items.map((item, place) => [this.name(item),
          ...columns.map(([, name]) => digits(part.series[name][place]))])));
    this.listen();
  }

  name(item) {
    const [operand, named] = [this.data.get("operand", item), this.data.get("name", item)];
    return operand ?? (named || this.data.get("node", item));
  }

  legend() {
    const { rms, predicted, amax } = this.part.series;
    const entries = [["rms", "measured RMS", rms], ["stem", "up to amax", amax],
      ["predicted", "predicted RMS", predicted]]
      .filter(([, , values]) => values.some(isNumber));
    return make("ul", { class: "legend" }, entries.map(([kind, text]) =>
      make("li", {}, make("span", { class: `key ${kind}` }), text)));
  }

  caption() {
    const { rms, predicted } = this.part.series;
    const seen = rms.filter((value) => value > 0);
    const said = [`${this.part.items.length} tensors in graph order.`];
    if (seen.length) {
      const [low, high] = [Math.min(...seen), Math.max(...seen)].map(Math.log2).map(Math.round);
      said.push(`RMS from about ${power(low)} to ${power(high)}.`);
    }
    const ratios = rms.map((value, place) => predicted[place] / value)
      .filter((ratio) => isNumber(ratio) && ratio > 0);
    if (ratios.length) {
      const near = ratios.filter((ratio) => ratio >= 0.5 && ratio <= 2).length;
      said.push(`${near} of ${ratios.length} predictions are within 2× of what was measured.`);
    }
    return said.join(" ");
  }

  render(range) {
    const width = Math.max(this.element.clientWidth, 260);
    const count = this.part.items.length;
    const step = (width - leftMargin - rightMargin) / count;
    this.x = (place) => leftMargin + (place + 0.5) * step;
    this.step = step;
    const { kurtosis, sqnr, rms } = this.part.series;
    const svg = draw("svg", { "aria-hidden": "true" });
    let top = 8;
    if (rms.some(isNumber)) top = this.magnitudes(svg, top, 210, width, range);
    if (kurtosis.some(isNumber)) {
      top = this.panel(svg, top, 84, width, { title: "kurtosis", values: kurtosis, log: true,
        kind: "kurtosis", reference: 3 });
    }
    if (sqnr.some(isNumber)) {
      top = this.panel(svg, top, 84, width, { title: "SQNR, dB", values: sqnr, kind: "sqnr" });
    }
    const height = this.layers(svg, top, width);
    this.cursor = line("cursor", 0, 4, 0, top - 10);
    this.cursor.setAttribute("visibility", "hidden");
    svg.prepend(this.cursor);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.plot.replaceChildren(svg);
    this.hide();
  }

  magnitudes(svg, top, height, width, range) {
    const { rms, amax, predicted } = this.part.series;
    const bands = this.part.items.map((item) => (range === ownRange
      ? ownBand(this.data, this.get, item) : this.data.plain[range] ?? null));
    const sizes = [...rms, ...amax, ...predicted].filter((value) => isNumber(value) && value > 0)
      .map(Math.log2);
    if (!sizes.length) sizes.push(0); // all are zero, or no numbers: an axis around 1
    const [least, most] = [Math.min(...sizes) - 1, Math.max(...sizes) + 1];
    const ends = bands.filter(Boolean).map((ends) => ends.map(Math.log2));
    const low = Math.min(least, ...ends.map((end) => Math.max(end[0] - 0.5, least - 8)));
    const high = Math.max(most, ...ends.map((end) => Math.min(end[2] + 0.5, most + 8)));
    const floor = top + height;
    const y = (exponent) => floor - ((Math.max(low, Math.min(high, exponent)) - low) /
      (high - low)) * height;
    this.bands(svg, bands, y, width);
    this.frame(svg, floor, width, wholeTicks(low, high, 7).map((tick) => [y(tick), power(tick)]),
      "magnitude", top);
    const at = (value) => (isNumber(value) && value > 0 ? y(Math.log2(value)).toFixed(1) : null);
    const path = (kind, mark) => {
      const found = this.part.items.map((_, place) => mark(place, this.x(place))).filter(Boolean);
      if (found.length) svg.append(draw("path", { class: kind, d: found.join("") }));
    };
    const wide = Math.min(3.5, Math.max(1, this.step * 0.45));
    path("stem", (place, x) => at(amax[place]) && at(rms[place]) &&
      `M${x.toFixed(1)} ${at(rms[place])}V${at(amax[place])}`);
    path("predicted", (place, x) => at(predicted[place]) &&
      `M${(x - wide).toFixed(1)} ${at(predicted[place])}h${(2 * wide).toFixed(1)}`);
    path(`rms${this.step < 4 ? " dense" : ""}`, (place, x) => at(rms[place]) &&
      `M${x.toFixed(1)} ${at(rms[place])}h0`);
    return floor + 22;
  }

  // Neighbours with the same band are one rectangle.
  bands(svg, bands, y, width) {
    let first = 0;
    for (let place = 1; place <= bands.length; place += 1) {
      if (place < bands.length && String(bands[place]) === String(bands[first])) continue;
      if (bands[first]) {
        const [low, normal, high] = bands[first].map((end) => y(Math.log2(end)));
        const [x, across] = [this.x(first - 0.5), (place - first) * this.step];
        svg.append(band("range", x, high, across, normal - high),
          band("range sub", x, normal, across, low - normal));
      }
      first = place;
    }
  }

  panel(svg, top, height, width, { title, values, log, kind, reference }) {
    const scaled = (value) => (log ? Math.log10(Math.max(value, 1)) : value);
    const seen = values.filter(isNumber).map(scaled);
    const low = Math.min(0, ...seen);
    const high = Math.max(...seen, log ? 1 : 10) * 1.05;
    const floor = top + height;
    const y = (value) => floor - ((value - low) / (high - low)) * height;
    const ticks = log ? wholeTicks(0, high, 3).map((tick) => [y(tick), thousands(10 ** tick)])
      : roundTicks(low, high, 3).map((tick) => [y(tick), digits(tick)]);
    this.frame(svg, floor, width, ticks, title, top);
    if (reference) {
      svg.append(line("reference", leftMargin, y(scaled(reference)), width - rightMargin,
        y(scaled(reference))));
    }
    const marks = values.map((value, place) => isNumber(value) &&
      `M${this.x(place).toFixed(1)} ${floor}V${y(scaled(value)).toFixed(1)}`).filter(Boolean);
    svg.append(draw("path", { class: kind, d: marks.join(""),
      "stroke-width": Math.max(0.8, Math.min(5, this.step * 0.6)).toFixed(1) }));
    return floor + 22;
  }

  frame(svg, floor, width, ticks, title, top) {
    for (const [y, text] of ticks) {
      svg.append(line("grid", leftMargin, y, width - rightMargin, y),
        label("tick", leftMargin - 6, y + 4, "end", text));
    }
    const name = label("tick", 0, 0, "middle", title);
    name.setAttribute("transform", `rotate(-90) translate(${-(top + floor) / 2} 11)`);
    svg.append(line("axis", leftMargin, floor, width - rightMargin, floor), name);
  }

  // Where each layer begins, named as far as there is room; returns the height of the drawing.
  layers(svg, bottom, width) {
    const runs = runsOf(this.part.items.map((item) => layerOf(this.get("module", item))));
    const prefixes = new Set(runs.filter((run) => run.layer)
      .map((run) => run.layer.replace(/\d+$/, "")));
    const common = prefixes.size === 1 ? [...prefixes][0] : "";
    const textOf = (run) =>
      (common ? run.layer.slice(common.length) : run.layer.split(".").slice(-2).join("."));
    const named = runs.filter((run) => run.layer);
    const widest = Math.max(0, ...named.map((run) => 7.2 * textOf(run).length + 6));
    const room = (width - leftMargin - rightMargin) / named.length;
    const each = 2 ** Math.max(0, Math.ceil(Math.log2(widest / room)));
    let free = leftMargin - 4;
    named.forEach((run, place) => {
      const start = this.x(run.first - 0.5);
      svg.prepend(line("grid", start, 8, start, bottom - 22));
      const text = textOf(run);
      const middle = start + (run.count * this.step) / 2;
      const half = 3.6 * text.length + 1;
      if (place % each || middle - half < free || middle + half > width) return;
      svg.append(label("tick", middle, bottom - 6, "middle", text));
      free = middle + half;
    });
    const title = common ? common.replace(/\.$/, "") : "tensors, in graph order";
    svg.append(label("tick", (leftMargin + width - rightMargin) / 2, bottom + 11, "middle", title));
    return bottom + 18;
  }

  spoken(place) {
    const item = this.part.items[place];
    return [this.name(item), ...this.figures(place).map(([head, value]) => `${head} ${value}`)]
      .join(", ");
  }

  figures(place) {
    const { rms, amax, predicted, kurtosis, sqnr } = this.part.series;
    const format = this.get("format", this.part.items[place]);
    return [["RMS", digits(rms[place])], ["predicted", digits(predicted[place])],
      ["amax", digits(amax[place])], ["kurtosis", digits(kurtosis[place])],
      ["SQNR", sqnr[place] === null ? "" : `${digits(sqnr[place])} dB`], ["format", format ?? ""]]
      .filter(([, value]) => value !== "");
  }

  show(place) {
    this.place = Math.max(0, Math.min(this.part.items.length - 1, place));
    const item = this.part.items[this.place];
    const x = this.x(this.place);
    this.cursor.setAttribute("x1", x);
    this.cursor.setAttribute("x2", x);
    this.cursor.setAttribute("visibility", "visible");
    this.plot.setAttribute("aria-valuenow", this.place + 1);
    this.plot.setAttribute("aria-valuetext", this.spoken(this.place));
    const where = [shortOperator(this.get("op", item) ?? ""), this.get("module", item)];
    this.tip.replaceChildren(make("b", {}, this.name(item)),
      make("small", {}, where.filter(Boolean).join(" · ")),
      make("dl", {}, this.figures(this.place).map(([head, value]) =>
        make("div", {}, make("dt", {}, head), make("dd", {}, value)))));
    this.tip.hidden = false;
    const room = this.plot.clientWidth - this.tip.offsetWidth;
    const left = x + 14 > room ? x - 14 - this.tip.offsetWidth : x + 14;
    this.tip.style.left = `${Math.max(0, Math.min(left, room))}px`;
  }

  hide() {
    this.tip.hidden = true;
    this.cursor?.setAttribute("visibility", "hidden");
  }

  choose() {
    const item = this.part.items[this.place];
    this.open(this.data.get("record", item) ?? item, this.plot);
  }

  listen() {
    const at = (event) => Math.floor((event.clientX - this.plot.getBoundingClientRect().left -
      leftMargin) / this.step);
    this.plot.addEventListener("pointermove", (event) => this.show(at(event)));
    this.plot.addEventListener("pointerleave", () => this.hide());
    this.plot.addEventListener("click", (event) => {
      this.show(at(event));
      this.choose();
    });
    this.plot.addEventListener("focus", () => {
      if (this.plot.matches(":focus-visible")) this.show(this.place);
    });
    this.plot.addEventListener("blur", () => this.hide());
    this.plot.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") this.choose();
      else if (event.key === "Escape") this.hide();
      else {
        const target = { ArrowRight: this.place + 1, ArrowUp: this.place + 1,
          ArrowLeft: this.place - 1, ArrowDown: this.place - 1, PageUp: this.place + 10,
          PageDown: this.place - 10, Home: 0, End: this.part.items.length - 1 }[event.key];
        if (target === undefined) return;
        this.show(target);
      }
      event.preventDefault();
    });
  }
}
