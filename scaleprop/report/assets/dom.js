// Elements, and how numbers are spelled. Text is only ever set as text: names cannot become markup.
const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== ""));
  return element;
};

const svgSpace = new DOMParser().parseFromString("<svg/>", "text/html").body.firstChild.namespaceURI;

const draw = (tag, attributes = {}, ...children) => {
  const element = document.createElementNS(svgSpace, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.flat());
  return element;
};

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

// Three digits: 1, 0.236, 2.4e-5.
const digits = (value) => {
  if (value === null || value === undefined) return "";
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "NaN" : value > 0 ? "∞" : "−∞";
  return String(Number(value.toPrecision(3))).replace("-", "−").replace("e−", "e-");
};

const percent = (share) =>
  share === 0 ? "0 %" : share < 1e-4 ? "< 0.01 %" : `${(100 * share).toFixed(share < 0.1 ? 2 : 1)} %`;

const thousands = (count) => count.toLocaleString("en-GB").replaceAll(",", "\u202f");

const raised = (exponent) =>
  String(exponent).replace(/./g, (c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[Number(c)]));

// 2⁻⁷
const power = (exponent) => `2${raised(exponent)}`;

const shortened = (name, length) => (name.length <= length ? name : `…${name.slice(1 - length)}`);

const shortOperator = (op) => op.replace(/^aten\./, "").replace(/\.default$/, "");

// The text that the page carries deflated.
const inflated = async (element) => {
  const bytes = Uint8Array.from(atob(element.textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).text();
};

// The data that the page carries: columns by name, each with one entry per tensor.
const readData = async () => {
  const found = JSON.parse(await inflated(document.getElementById("data")));
  const numbers = { Infinity, "-Infinity": -Infinity, NaN };
  const named = (value) => (typeof value === "string" ? numbers[value] ?? value : value);
  const texts = new Set(["node", "op", "operand", "role", "module", "shape", "format", "kind", "by",
    "reason", "lowering", "source", "pass", "statistic", "value", "name", "phase", "layer",
    "rounding", "rotation", "scaling", "why"]);
  const count = found.ids.length;
  for (const [name, column] of Object.entries(found.tensors)) {
    const values = Array.isArray(column) ? column : column.at.map((place) => column.of[place]);
    found.tensors[name] = texts.has(name) ? values : values.map(named);
  }
  for (const name of ["formats", "plain"]) { // or a format called "constructor" would be one
    found[name] = Object.assign(Object.create(null), found[name]);
  }
  found.count = count;
  found.get = (name, index) => found.tensors[name]?.[index] ?? null;
  return found;
};
