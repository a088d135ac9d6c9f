// What all parts use: elements, what the reader has set, numbers, colours, ranges of axes.

const data = JSON.parse(document.getElementById("data").textContent);

/// An element with attributes and children. Strings become text, never HTML.
function element(tag, attributes = {}, ...children) {
  const svg = ["svg", "path"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/// What the reader has set, by part. It outlives a reload, not the tab.
const memory = {
  key: "candle-grad-clip page " + location.pathname,
  all: { parts: {} },
  load() {
    try { this.all = JSON.parse(sessionStorage.getItem(this.key)) ?? this.all; } catch { /* forbidden, or not ours */ }
  },
  save() {
    try { sessionStorage.setItem(this.key, JSON.stringify(this.all)); } catch { /* forbidden or full */ }
  },
  part(key) { return (this.all.parts[key] ??= {}); },
};
memory.load();

/// Whether a button is held down: no reload then.
let held = false;
addEventListener("pointerdown", () => { held = true; }, true);
for (const end of ["pointerup", "pointercancel"]) addEventListener(end, () => { held = false; }, true);

/// A number as JSON holds it: "nan", "inf" and "-inf" are text.
const NON_FINITE = { nan: NaN, inf: Infinity, "-inf": -Infinity };
const number = (value) => (typeof value === "string" ? NON_FINITE[value] : value ?? NaN);

/// A number as it is read: up to six digits.
function format(value) {
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "inf" : "-inf";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e15) return size < 1e4 ? String(value) : value.toLocaleString("en-US");
  if (size >= 1e6 || size < 1e-4) return String(Number(value.toPrecision(5)).toExponential()).replace("e+", "e");
  return String(Number(value.toPrecision(6)));
}

/// The label of a tick: short.
function formatTick(value) {
  const size = Math.abs(value);
  if (size >= 1e7 || (size < 1e-3 && size > 0)) return Number(value.toPrecision(4)).toExponential().replace("e+", "e");
  return format(Number(value.toPrecision(8)));
}

/// The label of a tick on an axis: on a logarithmic one that goes far, all are powers.
function axisLabel(at, log, [low, high]) {
  const value = valueAt(at, log);
  if (!log || Math.max(Math.abs(low), Math.abs(high)) < 4.5) return formatTick(value);
  return Number(value.toPrecision(3)).toExponential().replace("e+", "e").replace(/e0$/, "");
}

/// A long text with its middle cut out.
function shorten(text, most) {
  const characters = [...text];
  if (characters.length <= most) return text;
  const head = Math.ceil((most - 1) / 2);
  return characters.slice(0, head).join("") + "…" + characters.slice(characters.length - (most - 1 - head)).join("");
}

/// A name of parts with dots: all parts but the last are cut to three letters, then to one, as far
/// as needed, and only then is the middle cut out. So names that differ mostly stay different.
function shortenPath(text, most) {
  const parts = text.split(".");
  for (const kept of [3, 1]) {
    for (let i = 0; i < parts.length - 1 && parts.join(".").length > most; i++) {
      if (!/^\d+$/.test(parts[i])) parts[i] = [...parts[i]].slice(0, kept).join("");
    }
  }
  return shorten(parts.join("."), most);
}

/// The line above a figure, if there is one.
const caption = (title, id) => (title ? [element("figcaption", {}, element("h3", { id }, title))] : []);

// Okabe and Ito's colours for colour-blind readers, darker on white and lighter on black so that
// each has a contrast of 3 to 1 or more.
const THEMES = {
  light: {
    ink: "#1c2228", soft: "#566069", grid: "#e4e8ec", edge: "#aeb6be", back: "#ffffff",
    lines: ["#0072b2", "#d55e00", "#00805f", "#b8578f", "#a87200", "#3f90c4", "#30363d"],
  },
  dark: {
    ink: "#e4e8ec", soft: "#a2adb8", grid: "#29313a", edge: "#56616c", back: "#12161b",
    lines: ["#4ba6e6", "#ff8548", "#2dc6a0", "#e69ac8", "#f2b134", "#a9dcff", "#e8eaed"],
  },
};
const theme = () => THEMES[document.documentElement.dataset.theme] ?? THEMES.light;
// In single quotes: the library puts it into attributes of SVG as it is.
const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif";

const color = (style) => theme().lines[style % 7];
/// The corners of markers, which tell lines apart where colours do not.
const SYMBOLS = [
  "M-4,-10L4,-10L10,-4L10,4L4,10L-4,10L-10,4L-10,-4Z", "M-9,-9L9,-9L9,9L-9,9Z", "M0,-12L11,8L-11,8Z",
  "M0,-13L13,0L0,13L-13,0Z", "M0,12L11,-8L-11,-8Z", "M12,0L-8,11L-8,-11Z", "M-12,0L8,11L8,-11Z",
];
const symbol = (style) => SYMBOLS[style % 7];
/// Past the last colour, symbols are hollow and lines have long dashes.
const isHollow = (style) => Math.floor(style / 7) % 2 === 1;
function dash(line) {
  if (line.dashed) return [[6, 4], [2, 3], [8, 3, 2, 3]][line.style % 3];
  return isHollow(line.style) ? [14, 3] : "solid";
}

/// A piece of a line with its symbol, for legends.
function swatch(line) {
  const stroke = color(line.style);
  const dashes = dash(line);
  return element("svg", { class: "swatch", width: 26, height: 12, viewBox: "-26 -12 52 24", "aria-hidden": "true" },
    element("path", { d: "M-26,0L26,0", stroke, "stroke-width": line.faint ? 2 : 4, "stroke-dasharray": dashes === "solid" ? "none" : dashes.map((part) => part * 2).join(" ") }),
    element("path", { d: line.faint ? "" : symbol(line.style), stroke, "stroke-width": 3, fill: isHollow(line.style) ? theme().back : stroke, transform: "scale(.8)" }));
}

/// The position of a value on an axis: its logarithm, if the axis is logarithmic. NaN is nowhere.
const LARGEST = 1e300;
function position(value, log) {
  if (!Number.isFinite(value)) return NaN;
  if (!log) return Math.max(-LARGEST, Math.min(LARGEST, value));
  return value > 0 ? Math.log10(value) : NaN;
}
const valueAt = (at, log) => (log ? 10 ** at : at);

/// The range that shows all positions with a margin. Logarithms that lie 3 decades outside the
/// middle 80 % are left outside: a run that diverges would squash all others into a line.
function rangeOf(positions, log, margin = 0.05) {
  const sorted = Float64Array.from(positions).sort();
  if (!sorted.length) return [0, 1];
  let [low, high] = [sorted[0], sorted[sorted.length - 1]];
  if (log) {
    const quantile = (share) => sorted[Math.round((sorted.length - 1) * share)];
    low = Math.max(low, quantile(0.1) - 3);
    high = Math.min(high, quantile(0.9) + 3);
  }
  const largest = Math.max(Math.abs(low), Math.abs(high));
  const narrow = log ? 0.02 : largest * 1e-6;
  const instead = log ? 0.1 : largest > 0 ? largest * 0.1 : 1;
  const add = high - low <= narrow ? instead : margin * (high - low);
  return [low - add, high + add];
}

/// Round positions in a range, about `room` at most.
function ticksIn([low, high], log, room) {
  const width = high - low;
  if (log && width > 0.5) {
    const perDecade = room / width;
    const digits = perDecade >= 7 ? [1, 2, 3, 4, 5, 6, 8] : perDecade >= 3 ? [1, 2, 5] : [1];
    const stride = Math.max(1, Math.ceil(1 / perDecade));
    const ticks = [];
    for (let decade = Math.floor(low / stride) * stride; decade <= high; decade += stride) {
      for (const digit of digits) ticks.push(decade + Math.log10(digit));
    }
    return ticks.filter((at) => at >= low && at <= high);
  }
  const [from, to] = [valueAt(low, log), valueAt(high, log)];
  const rough = (to - from) / Math.max(1, room);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((times) => times * power >= rough * 0.75);
  const ticks = [];
  for (let i = Math.ceil(from / step); i * step <= to && ticks.length < 50; i++) ticks.push(position(i * step, log));
  return ticks;
}

/// Downloads an option of the chart library as an SVG file.
function saveSvg(name, option, width, height) {
  const chart = echarts.init(null, null, { renderer: "svg", ssr: true, width, height });
  chart.setOption({ ...option, backgroundColor: theme().back });
  const url = URL.createObjectURL(new Blob([chart.renderToSVGString()], { type: "image/svg+xml" }));
  chart.dispose();
  const file = name.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "chart";
  element("a", { href: url, download: file + ".svg" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

/// Draws a chart once it comes near the screen, and again when its width or the theme changes.
const redraws = new Set();
const drawsOf = new WeakMap();
const nearby = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    nearby.unobserve(entry.target);
    const draw = drawsOf.get(entry.target);
    redraws.add(draw);
    new ResizeObserver(() => draw()).observe(entry.target);
  }
}, { rootMargin: "600px" });
function drawWhenNear(box, draw) {
  drawsOf.set(box, draw);
  nearby.observe(box);
}
