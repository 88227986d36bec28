// One tensor in full: opened by its fragment (#t=…), so that links and the back button work.

const startPanel = (data, { visible, rowOf }) => {
  const places = new Map(data.ids.map((id, place) => [id, place]));
  const body = make("div", { class: "panel-body" });
  const heading = make("h2", { id: "panel-heading", tabindex: "-1" });
  const button = (text, name) => make("button", { type: "button", "aria-label": name, title: name },
    text);
  const [before, after, close] = [button("↑", "Previous tensor"), button("↓", "Next tensor"),
    button("✕", "Close (Escape)")];
  const panel = make("aside", { id: "panel", "aria-labelledby": "panel-heading", hidden: true },
    make("div", { class: "panel-head" }, heading, make("div", { class: "panel-buttons" }, before,
      after, close)), body);
  document.querySelector("main").after(panel);
  let origin = null; // what had the focus when the panel was opened
  let current = null;

  const fragment = (place) => fragmentOf(data, place);
  const mark = (place, on) => rowOf(place)?.classList.toggle("open", on);

  const show = (place) => {
    if (current !== null) mark(current, false);
    current = place;
    mark(place, true);
    heading.textContent = titleOf(data, place);
    body.replaceChildren(...detailsOf(data, place, (target, text) => linkTo(target, text)));
    panel.hidden = false;
    document.body.classList.add("opened");
    panel.scrollTop = 0;
    heading.focus({ preventScroll: true });
  };
  const hide = () => {
    if (current === null) return;
    const row = rowOf(current);
    mark(current, false);
    current = null;
    panel.hidden = true;
    document.body.classList.remove("opened");
    const target = origin?.isConnected && origin.offsetParent ? origin : row?.querySelector("a");
    origin = null;
    target?.focus();
  };
  const open = (place, from) => {
    if (current === null) origin = from ?? document.activeElement;
    if (location.hash !== fragment(place)) history.pushState(null, "", fragment(place));
    show(place);
  };
  const shut = () => {
    history.pushState(null, "", location.pathname + location.search);
    hide();
  };
  const follow = () => {
    let wanted = null;
    try {
      wanted = /^#t=(.*)$/s.exec(decodeURIComponent(location.hash))?.[1] ?? null;
    } catch { /* no fragment of ours */ }
    const place = wanted === null ? undefined : places.get(wanted);
    if (place === undefined) hide();
    else show(place);
  };
  const linkTo = (place, text) => make("a", { href: fragment(place) }, text);

  const move = (by) => {
    const among = visible();
    const place = among.indexOf(current);
    const target = among[place < 0 ? 0 : place + by];
    if (target !== undefined) {
      open(target);
      rowOf(target)?.scrollIntoView({ block: "nearest" });
    }
  };
  before.addEventListener("click", () => { move(-1); before.focus(); });
  after.addEventListener("click", () => { move(1); after.focus(); });
  close.addEventListener("click", shut);
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.('a[href^="#t="]');
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const place = places.get(decodeURIComponent(link.getAttribute("href").slice(3)));
    if (place === undefined) return;
    event.preventDefault();
    open(place, panel.contains(link) ? origin : link);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && current !== null) shut();
  });
  window.addEventListener("popstate", follow);
  window.addEventListener("hashchange", follow);
  follow();
  return open;
};

const fragmentOf = (data, place) => `#t=${encodeURIComponent(data.ids[place])}`;

const titleOf = (data, place) =>
  data.get("operand", place) ?? (data.get("name", place) || data.get("node", place));

// Everything that is known of a tensor, as elements.
const detailsOf = (data, place, link) => [
  ...whereIs(data, place),
  ...outcomeOf(data, place),
  ...histogramsOf(data, place),
  ...headed("Figures", figuresOf(data, place)),
  ...provenanceOf(data, place, link),
  ...neighboursOf(data, place, link),
];

const headed = (name, list) => (list.childElementCount ? [make("h3", {}, name), list] : []);

const facts = (pairs) => make("dl", { class: "facts" }, pairs
  .filter(([, value]) => value !== null && value !== undefined && value !== "")
  .map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));

const whereIs = (data, place) => {
  const get = (name) => data.get(name, place);
  return [facts([
    [get("operand") === null ? "made by" : "operand of",
      get("op") ? make("span", {}, shortOperator(get("op")), " ", make("code", {}, get("node")))
        : make("code", {}, get("node"))],
    ["module", get("module") && make("code", {}, get("module"))],
    ["source", get("source") && make("code", {}, get("source"))],
    ["shape", get("shape")], ["role", get("role")], ["phase", get("phase")],
    ["layer", get("layer") && make("code", {}, get("layer"))],
    ["format", get("operand") === null ? get("format") : ""], ["rounding", get("rounding")],
    ["rotation", get("rotation")], ["scale", get("scaling")], ["why", get("why")],
  ])];
};

const outcomeOf = (data, place) => {
  const get = (name) => data.get(name, place);
  if (get("operand") === null) return [];
  const sentence = get("format")
    ? [make("b", {}, get("format")), `, decided by ${get("by")}.`]
    : [make("b", {}, "High precision"), `: ${get("reason") ?? "no reason given"} (${get("by")}).`];
  return [make("h3", {}, "What became of it"), make("p", {}, ...sentence,
    get("lowering") ? ` It runs as ${get("lowering")}.` : "")];
};

const histogramsOf = (data, place) => {
  const get = (name) => data.get(name, place);
  const format = data.formats[get("format")] ?? null;
  const found = [];
  if (get("scaled")?.length) {
    found.push(histogramChart(get("scaled"), format, {
      title: "Exponents in its format", axis: "|x ÷ scale|", note: formatNote(format),
      saturated: get("saturated") }));
  }
  const own = get("exponents") ?? [];
  if (own.length) {
    const range = get("operand") === null ? data.plain[document.getElementById("range")?.value] : null;
    found.push(histogramChart(own, range ?? null, { title: "Exponents as they are", axis: "|x|",
      note: range ? `Shaded: ${range[4]} without a scale.`
        : get("kind") === "weight" ? "The weight as it is stored, scaled back." : "" }));
  }
  return found.length ? [make("h3", {}, "Distribution"), ...found] : [];
};

const formatNote = (format) => {
  if (!format) return "";
  const [smallest, normal, largest, bits, name, block, scale] = format;
  const ends = smallest === normal ? `${digits(smallest)} to ${digits(largest)}`
    : `${digits(smallest)} (normal from ${digits(normal)}) to ${digits(largest)}`;
  return `Shaded: ${name}, ${bits} bits, ${ends}` +
    `${block ? `; blocks of ${block}` : ""}${scale ? `, scales in ${scale}` : ""}.`;
};

const figuresOf = (data, place) => {
  const get = (name) => data.get(name, place);
  const share = (name) => (get(name) === null ? "" : percent(get(name)));
  const ratio = get("predicted") && get("rms") ? ` (${digits(get("predicted") / get("rms"))}×)` : "";
  const decibels = get("sqnr");
  const stored = get("bytes") === null ? "" : `${thousands(get("bytes"))} B` +
    (get("before") && get("before") !== get("bytes") ? ` of ${thousands(get("before"))} B` : "");
  return facts([
    ["SQNR", decibels === null ? "" : decibels === Infinity ? "exact" : `${digits(decibels)} dB`],
    ["saturated", share("saturated")], ["underflowed", share("underflowed")],
    ["stored", stored], ["RMS", digits(get("rms"))],
    ["predicted RMS", get("predicted") === null ? "" : digits(get("predicted")) + ratio],
    ["amax", digits(get("amax"))], ["mean", digits(get("mean"))],
    ["kurtosis", get("kurtosis") === null ? "" : `${digits(get("kurtosis"))} (3: normal)`],
    ["zeros", share("zeros")], ["NaN or Inf", get("nonfinite") ? share("nonfinite") : ""],
    ["values looked at", get("count") === null ? "" : thousands(get("count"))],
    ["lost without a scale", (get("flags") ?? []).join(", ")],
  ]);
};

const provenanceOf = (data, place, link) => {
  const get = (name) => data.get(name, place);
  if (get("pass") === null && get("low") === null && get("kind") === null) return [];
  const kinds = { weight: "Found with the weight", static: "Found once, by calibration",
    dynamic: "Found at run time, of each input" };
  const how = get("pass") ? `Found by ${get("pass")}` : kinds[get("kind")] ?? "Found";
  const of = get("statistic") ? `: ${get("statistic")}` : "";
  const seen = get("batches") ? `, over ${get("batches")} calibration batches` : "";
  const value = get("value");
  const scales = get("low") === null ? "" : get("low") === get("high")
    ? ` The scale is ${digits(get("low"))}.`
    : ` Scales lie between ${digits(get("low"))} and ${digits(get("high"))}.`;
  const near = (get("neighbours") ?? []).flatMap((name) => [valueLink(data, name, link), ", "])
    .slice(0, -1);
  return [make("h3", {}, "Scale"), make("p", {}, `${how}${of}${seen}.`,
    ...(value && value !== titleOf(data, place) ? [" Its numbers are those of ",
      valueLink(data, value, link), "."] : []), scales),
  near.length ? make("p", {}, "The same scale, or one moved to or from here: ", ...near, ".") : ""];
};

// A value by its name, or as "operand of node": a link where the page knows a tensor of it.
const valueLink = (data, name, link) => {
  const [, operand, node] = /^(.*) of (\S+)$/.exec(name) ?? [];
  const found = tensorsOf(data, "operand", name)[0] ?? tensorsOf(data, "node", name)[0] ??
    tensorsOf(data, "name", name)[0] ??
    tensorsOf(data, "operand", operand).find((place) => data.get("node", place) === node);
  return found === undefined ? make("code", {}, name) : link(found, name);
};

const tensorsOf = (data, column, name) => {
  data.indices ??= {};
  data.indices[column] ??= (data.tensors[column] ?? []).reduce((found, value, place) => {
    if (value !== null && value !== "") found.set(value, [...(found.get(value) ?? []), place]);
    return found;
  }, new Map());
  return data.indices[column].get(name) ?? [];
};

const neighboursOf = (data, place, link) => {
  const get = (name) => data.get(name, place);
  const [node, operand] = [get("node"), get("operand")];
  const operators = (places) => places.filter((other) => data.get("operand", other) !== null);
  const groups = operand === null ? [
    ["read by", operators(tensorsOf(data, "operand", node))],
    ["of the same parameter", get("name") ? tensorsOf(data, "name", get("name")) : []],
    ["in the same module", get("module") ? tensorsOf(data, "module", get("module")) : []],
  ] : [
    ["other operands", operators(tensorsOf(data, "node", node))],
    ["made by", tensorsOf(data, "node", operand)],
    ["read by", operators(tensorsOf(data, "operand", node))],
    ["the same value in", operators(tensorsOf(data, "operand", operand))],
  ];
  const most = 24;
  const items = groups.map(([name, places]) => {
    const others = places.filter((other) => other !== place);
    const links = others.slice(0, most).map((other) => make("li", {}, link(other,
      neighbourName(data, other, name)), formatOf(data, other)));
    if (others.length > most) links.push(make("li", {}, `and ${others.length - most} more`));
    return [name, links.length ? make("ul", { class: "links" }, links) : ""];
  });
  return items.some(([, list]) => list !== "") ? [make("h3", {}, "In the graph"), facts(items)] : [];
};

const neighbourName = (data, place, group) => (group === "other operands"
  ? titleOf(data, place) : data.get("operand", place) === null ? titleOf(data, place)
    : `${shortOperator(data.get("op", place))} ${data.get("node", place)}`);

const formatOf = (data, place) => (data.get("operand", place) === null ? ""
  : make("small", {}, ` ${data.get("format", place) ?? "high"}`));
