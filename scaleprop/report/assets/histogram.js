// The exponents of a tensor's values, over what its format can represent.

// format: [smallest, smallest normal, largest, …] or null where there is none to hold it against.
const rangeOf = (format) => format && ({
  low: Math.floor(Math.log2(format[0])),
  normal: Math.floor(Math.log2(format[1])),
  high: Math.floor(Math.log2(format[2])),
});

// normal, subnormal, under (rounds to zero) or over (is saturated). Values in [½, 1) of the smallest
// number round to it.
const kindOf = (exponent, range) => {
  if (!range) return "normal";
  if (exponent > range.high) return "over";
  if (exponent >= range.normal) return "normal";
  return exponent >= range.low - 1 ? "subnormal" : "under";
};

const partsOf = (histogram) => histogram.slice(1).map((part, place) =>
  ({ exponent: histogram[0] + place, share: part / 1e5 }));

const kindNames = {
  normal: "in range", subnormal: "subnormal or rounded up to the smallest", under: "rounds to zero",
  over: "saturates",
};

const histogramChart = (histogram, format, { title, axis, note = "", saturated = 0 }) => {
  const parts = partsOf(histogram);
  const range = rangeOf(format);
  const first = Math.min(parts[0].exponent, range ? range.low - 1 : Infinity);
  const last = Math.max(parts.at(-1).exponent, range ? range.high : -Infinity) + 1;
  const [width, height, left, right, top, bottom] = [440, 190, 46, 8, 22, 40];
  const x = (exponent) => left + ((exponent - first) / (last - first)) * (width - left - right);
  const floor = height - bottom;
  const most = Math.max(...parts.map((part) => part.share));
  const y = (share) => floor - (share / most) * (floor - top);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", class: "histogram" });
  if (range) {
    const edge = Math.max(range.normal, range.low);
    svg.append(band("range sub", x(range.low), top, x(edge) - x(range.low), floor - top),
      band("range", x(edge), top, x(range.high + 1) - x(edge), floor - top));
    const middle = (a, b) => (x(a) + x(b)) / 2;
    svg.append(label("mark", middle(edge, range.high + 1), top - 7, "middle", format[4]));
    if (x(edge) - x(range.low) > 60) {
      svg.append(label("mark", middle(range.low, edge), top - 7, "middle", "subnormal"));
    }
  }
  for (const tick of roundTicks(0, most, 3)) {
    svg.append(line("grid", left, y(tick), width - right, y(tick)),
      label("tick", left - 6, y(tick) + 4, "end", `${digits(100 * tick)} %`));
  }
  const gap = Math.min(1, (x(1) - x(0)) / 6);
  for (const part of parts.filter((each) => each.share > 0)) {
    const tall = Math.max(floor - y(part.share), 1.5);
    const bar = band(`bar ${kindOf(part.exponent, range)}`, x(part.exponent) + gap / 2, floor - tall,
      x(1) - x(0) - gap, tall);
    bar.append(draw("title", {}, `[${power(part.exponent)}, ${power(part.exponent + 1)}): ` +
      `${percent(part.share)}, ${kindNames[kindOf(part.exponent, range)]}`));
    svg.append(bar);
  }
  svg.append(line("axis", left, floor, width - right, floor));
  for (const tick of wholeTicks(first, last, 9)) {
    svg.append(line("axis", x(tick), floor, x(tick), floor + 4),
      label("tick", x(tick), floor + 17, "middle", power(tick)));
  }
  svg.append(label("tick", (left + width - right) / 2, height - 6, "middle", axis));
  const described = describe(parts, range, saturated);
  svg.setAttribute("aria-label", `${title}. ${described}`);
  return make("figure", {}, make("h4", {}, title), svg,
    make("figcaption", {}, [note, described].filter(Boolean).join(" ")),
    dataTable("Numbers of this histogram", title, ["exponent", "share", "in the format"],
      () => parts.map((part) => [power(part.exponent), percent(part.share),
        range ? kindNames[kindOf(part.exponent, range)] : ""])));
};

// saturated: whether any value does: the largest number may be within the highest power of two.
const describe = (parts, range, saturated) => {
  const present = parts.filter((part) => part.share > 0);
  const ends = `Values other than zero lie between ${power(present[0].exponent)} and ` +
    `${power(present.at(-1).exponent + 1)}`;
  if (!range) return `${ends}.`;
  const total = (kind) => present.filter((part) => kindOf(part.exponent, range) === kind)
    .reduce((sum, part) => sum + part.share, 0);
  const said = [["over", "above the range"], ["subnormal", "at or below its subnormals"],
    ["under", "round to zero"]].map(([kind, what]) => [total(kind), what])
    .filter(([share]) => share > 0).map(([share, what]) => `${percent(share)} ${what}`);
  if (saturated && !total("over")) said.unshift("some of the largest saturate");
  return `${ends}; ${said.length ? said.join(", ") : "all are in the range"}.`;
};
