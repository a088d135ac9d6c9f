// The page: its parts from top to bottom, the theme, reloads.

const keys = new Map();
/// The same after a reload, also if parts come and go before it.
function keyOf(section) {
  const name = `${section.kind} ${section.title}`;
  keys.set(name, (keys.get(name) ?? 0) + 1);
  return `${name} ${keys.get(name)}`;
}

function partOf(section, headings) {
  switch (section.kind) {
    case "heading": {
      const id = `part-${headings.length + 1}`;
      headings.push({ id, text: section.text });
      return element("h2", { id }, element("a", { href: `#${id}` }, section.text));
    }
    case "text": return textPart(section);
    case "line_chart": return new LineChart(section, keyOf(section)).element;
    case "heat_map": return new HeatMap(section).element;
    case "table": return tablePart(section, keyOf(section));
    case "links": return linksPart(section);
    default: return "";
  }
}

function build() {
  const headings = [];
  const parts = data.sections.map((section) => partOf(section, headings));
  const controls = element("div", { class: "controls" }, themeButton());
  const header = document.getElementById("header");
  header.append(controls);
  if (data.subtitle) header.append(element("p", { class: "subtitle" }, data.subtitle));
  if (data.refresh) controls.prepend(reloads(data.refresh.seconds));
  if (headings.length > 4) {
    header.after(element("nav", { "aria-label": "Contents" },
      element("ul", {}, ...headings.map(({ id, text }) => element("li", {}, element("a", { href: `#${id}` }, text))))));
  }
  document.getElementById("main").append(...parts);
}

function themeButton() {
  const root = document.documentElement;
  const button = element("button", { type: "button", onclick: () => {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("candle-grad-clip theme", root.dataset.theme); } catch { /* forbidden */ }
    name();
    for (const draw of redraws) draw();
  } });
  const name = () => { button.textContent = root.dataset.theme === "dark" ? "Light theme" : "Dark theme"; };
  name();
  return button;
}

/// How many loads one after the other have found the same data: a run that was killed says so.
function countUnchanged() {
  const text = document.getElementById("data").textContent;
  let sum = text.length;
  for (let i = 0; i < text.length; i++) sum = (31 * sum + text.charCodeAt(i)) | 0;
  memory.all.unchanged = memory.all.sum === sum ? (memory.all.unchanged ?? 0) + 1 : 0;
  memory.all.sum = sum;
  memory.save();
  return memory.all.unchanged;
}

/// A reload now and then, which the reader can stop. It waits while it would disturb, and longer
/// while nothing changes.
function reloads(seconds) {
  const input = element("input", { type: "checkbox", onchange: () => {
    memory.all.stopped = !input.checked;
    memory.save();
  } });
  input.checked = !memory.all.stopped;
  const every = Math.max(1, Number(seconds) || 10) * Math.min(8, 2 ** Math.max(0, countUnchanged() - 1));
  const disturbs = () => held || document.hidden || !getSelection().isCollapsed;
  setInterval(() => { if (input.checked && !disturbs()) location.reload(); }, every * 1000);
  return element("label", { class: "switch" }, input, `reload every ${format(every)} s`);
}

build();
history.scrollRestoration = "manual";
if (performance.getEntriesByType("navigation")[0]?.type !== "navigate") scrollTo(0, memory.all.scroll ?? 0);
addEventListener("pagehide", () => {
  memory.all.scroll = scrollY;
  memory.save();
});
// What was not near the screen yet is printed too.
addEventListener("beforeprint", () => {
  for (const box of document.querySelectorAll(".chart")) drawsOf.get(box)();
});
