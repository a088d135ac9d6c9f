// Uses the page as a reader would, and writes what came of it into `#result`. The page was loaded
// once before if `sessionStorage` says so: it has reloaded itself by then.

const result = {};
const charts = [...document.querySelectorAll(".chart")];
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const option = (chart) => echarts.getInstanceByDom(chart.querySelector(".canvas")).getOption();
const figure = (chart) => chart.closest("figure");
const range = (axis) => [axis.min, axis.max];

function point(chart, kind, across, down = 0.3) {
  const { left, top, width, height } = chart.getBoundingClientRect();
  const [clientX, clientY] = [left + across * width, top + down * height];
  chart.dispatchEvent(new PointerEvent(kind, { clientX, clientY, button: 0, pointerId: 1, bubbles: true }));
}

function drag(chart, from, to) {
  point(chart, "pointerdown", from);
  point(chart, "pointermove", (from + to) / 2);
  point(chart, "pointermove", to);
  result.selection = chart.querySelector(".selection").getBoundingClientRect().width > 50;
  point(chart, "pointerup", to);
}

/// How many colours a chart has.
function colors(chart) {
  const canvas = chart.querySelector("canvas");
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return new Set(new Uint32Array(data.buffer)).size;
}

async function useLines() {
  const [loss, norms] = charts;
  point(loss, "pointermove", 0.5);
  result.hover = loss.querySelector(".hover").innerText;
  result.cursor = loss.querySelector(".cursor").style.display;
  point(norms, "pointermove", 0.5);
  result.linkedHover = norms.querySelector(".hover").innerText;

  result.wholeX = option(norms).xAxis.map(range);
  result.wholeY = range(option(norms).yAxis[0]);
  drag(norms, 0.3, 0.5);
  result.zoomedX = option(norms).xAxis.map(range);
  result.zoomedY = range(option(norms).yAxis[0]);
  norms.dispatchEvent(new MouseEvent("dblclick", { bubbles: true }));
  result.resetX = option(norms).xAxis.map(range);
  norms.dispatchEvent(new KeyboardEvent("keydown", { key: "+", bubbles: true }));
  result.keyX = option(norms).xAxis.map(range);
  const reset = [...figure(norms).querySelectorAll("button")].find((button) => button.textContent === "Reset zoom");
  result.canReset = !reset.disabled;
  reset.click();
  result.buttonX = option(norms).xAxis.map(range);

  const [log] = figure(loss).querySelectorAll("input");
  result.logTop = option(loss).yAxis[0].max;
  log.click();
  result.linearTop = option(loss).yAxis[0].max;
  log.click();
  const count = () => option(loss).series.filter((series) => series.type === "line").length;
  result.lines = [count()];
  figure(loss).querySelector(".legend button").click();
  result.lines.push(count());
  figure(loss).querySelector(".legend button").click();
  result.crosses = option(loss).series.filter((series) => series.type === "custom").map((series) => series.data.length > 0);
}

async function useOthers() {
  const heat = charts[2];
  point(heat, "pointermove", 0.6, 0.3);
  result.cell = heat.querySelector(".hover").innerText;

  const named = charts[4];
  point(named, "pointermove", 0.4);
  result.named = named.querySelector(".hover").innerText;

  const table = document.querySelector("table.data");
  const first = () => [...table.querySelectorAll("tbody tr")].map((row) => row.cells[0].textContent);
  const head = table.querySelector("th");
  result.sort = [[head.getAttribute("aria-sort"), ...first()]];
  for (let i = 0; i < 2; i++) {
    head.querySelector("button").click();
    result.sort.push([head.getAttribute("aria-sort"), ...first()]);
  }
  result.injected = document.querySelectorAll("td b, .text script").length;
  result.links = [...document.querySelectorAll("ul.links li")].map((item) => item.querySelector("a")?.getAttribute("href") ?? null);
  result.contents = document.querySelectorAll("nav a").length;

  const themes = () => document.documentElement.dataset.theme;
  result.themes = [themes()];
  document.querySelector(".controls button").click();
  result.themes.push(themes());
  document.querySelector(".controls button").click();

  const files = [];
  URL.createObjectURL = (blob) => { files.push(blob); return "#"; };
  for (const chart of charts) [...figure(chart).querySelectorAll("button")].find((button) => button.textContent === "Save SVG").click();
  result.svg = (await Promise.all(files.map((file) => file.text()))).map((svg) => {
    const read = new DOMParser().parseFromString(svg, "image/svg+xml");
    return svg.length > 5000 && read.documentElement.tagName === "svg" && !read.querySelector("parsererror");
  });
}

async function main() {
  await wait(500);
  dispatchEvent(new Event("beforeprint"));
  result.colors = charts.map(colors);
  result.sideways = document.documentElement.scrollWidth > innerWidth;
  const norms = charts[1];
  if (!sessionStorage.getItem("second")) {
    drag(norms, 0.3, 0.5);
    scrollTo(0, 700);
    sessionStorage.setItem("second", JSON.stringify(option(norms).xAxis.map(range)));
    // Held down, nothing reloads.
    document.body.dispatchEvent(new PointerEvent("pointerdown", { bubbles: true }));
    await wait(5000);
    sessionStorage.setItem("waited", "yes");
    document.body.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
    return;
  }
  result.waited = sessionStorage.getItem("waited");
  document.querySelector(".controls input").click();
  result.scroll = scrollY;
  result.keptX = [JSON.parse(sessionStorage.getItem("second")), option(norms).xAxis.map(range)];
  norms.dispatchEvent(new MouseEvent("dblclick", { bubbles: true }));
  await useLines();
  await useOthers();
  result.faults = faults;
  document.body.prepend(Object.assign(document.createElement("pre"), { id: "result", textContent: JSON.stringify(result) }));
}
main().catch((error) => faults.push(String(error.stack)));
