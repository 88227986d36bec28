// What is wrong with the page for those who do not see it, or not well: a list of sentences.
() => {
  const wrong = [];
  const seen = (element) => element.checkVisibility({ visibilityProperty: true });
  const named = (element) => [
    element.getAttribute("aria-label"), element.textContent.trim(),
    ...[...element.labels ?? []].map((label) => label.textContent.trim()),
    document.getElementById(element.getAttribute("aria-labelledby"))?.textContent,
  ].some(Boolean);
  const where = (element) => `<${element.tagName.toLowerCase()} ${element.id} ${
    element.getAttribute("class") ?? ""}> ${element.textContent.trim().slice(0, 40)}`;

  for (const element of document.querySelectorAll("a, button, input, select, summary, nav, aside, " +
    "section, [role=slider], [role=region], [role=search], [tabindex='0']")) {
    const ownName = element.matches("nav, aside, section, [role]")
      ? element.hasAttribute("aria-label") || element.hasAttribute("aria-labelledby") : true;
    if (!named(element) || !ownName) wrong.push(`no name: ${where(element)}`);
  }
  for (const element of document.querySelectorAll("[aria-labelledby]")) {
    if (!document.getElementById(element.getAttribute("aria-labelledby"))) {
      wrong.push(`names what is not there: ${where(element)}`);
    }
  }
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  if (new Set(ids).size !== ids.length) wrong.push("ids are not unique");
  let level = 0;
  for (const heading of [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")].filter(seen)) {
    const next = Number(heading.tagName[1]);
    if (next > level + 1) wrong.push(`a level is skipped: ${where(heading)}`);
    level = next;
  }
  for (const [selector, count] of [["h1", 1], ["main", 1], ["header", 1], ["[role=status]", 1]]) {
    if (document.querySelectorAll(selector).length !== count) wrong.push(`not ${count}: ${selector}`);
  }
  for (const table of document.querySelectorAll("table")) {
    if (!table.caption) wrong.push(`no caption: ${where(table)}`);
    if (table.querySelector("th:not([scope])")) wrong.push(`no scope: ${where(table)}`);
  }
  for (const svg of document.querySelectorAll("svg")) {
    if (svg.getAttribute("aria-hidden") !== "true" && !svg.getAttribute("aria-label") &&
      !svg.getAttribute("aria-labelledby")) {
      wrong.push(`a drawing without words: ${where(svg)}`);
    }
  }
  for (const hidden of document.querySelectorAll("[aria-hidden=true]")) {
    if (hidden.querySelector("a, button, input, [tabindex]")) wrong.push(`hidden: ${where(hidden)}`);
  }
  for (const region of document.querySelectorAll(".scroll")) {
    if (region.tabIndex !== 0) wrong.push(`cannot be scrolled by keys: ${where(region)}`);
  }

  // contrast of text with the nearest background that is opaque, by WCAG 2.2
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (color) => {
    const [r, g, b] = rgb(color).map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (rgb(color)[3] === 255) return color;
    }
    return "white";
  };
  const checked = new Set();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || checked.has(element) || !seen(element)) continue;
    if (element.closest("script, style, noscript, option, title")) continue;
    checked.add(element);
    const style = getComputedStyle(element);
    const colors = [element.closest("svg") ? style.fill : style.color, behind(element)];
    const [dark, light] = colors.map(luminance).sort((a, b) => a - b);
    const ratio = (light + 0.05) / (dark + 0.05);
    if (ratio < 4.5) wrong.push(`contrast ${ratio.toFixed(2)}: ${colors} ${where(element)}`);
  }
  if (checked.size < 50) wrong.push(`only ${checked.size} texts were looked at`);
  return [...new Set(wrong)];
}
