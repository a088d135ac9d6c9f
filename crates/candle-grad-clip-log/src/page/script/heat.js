// Heat maps: rows by name, a colour a value on a logarithmic scale.

/// Viridis, dark to light.
const SHADES = [
  [68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141],
  [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37],
];
function shade(share) {
  const at = Math.max(0, Math.min(1, share)) * (SHADES.length - 1);
  const low = Math.min(SHADES.length - 2, Math.floor(at));
  return SHADES[low].map((part, i) => Math.round(part + (at - low) * (SHADES[low + 1][i] - part)));
}

/// Cells that are no number above 0: colour, and a pattern that shows without it.
const STATES = {
  missing: { text: "no value", look: "hatched", paint: (pen) => { pen.fillStyle = theme().back; pen.fillRect(0, 0, 8, 8); stroke(pen, theme().soft, "M-2,2L2,-2M0,8L8,0M6,10L10,6"); } },
  zero: { text: "exactly 0", look: "grey with dots", paint: (pen) => { pen.fillStyle = "#9aa1a8"; pen.fillRect(0, 0, 8, 8); pen.fillStyle = "#3a4148"; pen.fillRect(3, 3, 2, 2); } },
  nan: { text: "NaN", look: "red with crosses", paint: (pen) => { pen.fillStyle = "#e0103a"; pen.fillRect(0, 0, 8, 8); stroke(pen, "#ffffff", "M1,1L7,7M1,7L7,1"); } },
  inf: { text: "infinite", look: "striped", paint: (pen) => { pen.fillStyle = "#ffffff"; pen.fillRect(0, 0, 8, 8); pen.fillStyle = "#e0103a"; pen.fillRect(0, 1, 8, 2); pen.fillRect(0, 5, 8, 2); } },
};
function stroke(pen, style, path) {
  pen.strokeStyle = style;
  pen.stroke(new Path2D(path));
}
function pattern(pen, state) {
  const tile = element("canvas", { width: 8, height: 8 });
  STATES[state].paint(tile.getContext("2d"));
  return pen.createPattern(tile, "repeat");
}

class HeatMap {
  constructor(section) {
    this.section = section;
    this.rows = section.rows.map(([name, cells]) => ({ name, cells: cells.map((cell) => (cell === null ? null : number(cell))) }));
    const positions = [];
    for (const { cells } of this.rows) {
      for (const cell of cells) {
        const at = cell === null ? NaN : position(cell, true);
        if (!Number.isNaN(at)) positions.push(at);
      }
    }
    this.range = rangeOf(positions, true, 0);
    this.isEmpty = !positions.length;
    this.outside = [positions.some((at) => at < this.range[0]), positions.some((at) => at > this.range[1])];
    this.states = Object.keys(STATES).filter((state) => this.rows.some(({ cells }) => cells.some((cell) => this.state(cell) === state)));
    this.element = this.build();
    drawWhenNear(this.box, () => this.draw());
  }

  state(cell) {
    if (cell === null || cell === undefined) return "missing";
    if (Number.isNaN(cell)) return "nan";
    if (cell === Infinity || cell === -Infinity) return "inf";
    return cell > 0 ? null : "zero";
  }

  build() {
    const { section } = this;
    this.legend = element("div", { class: "legend" });
    const save = element("button", { type: "button", onclick: () => this.save() }, "Save SVG");
    this.box = element("div", {
      class: "chart", tabindex: 0, role: "group", "aria-roledescription": "heat map",
      "aria-label": `${section.title}: ${section.value_label} of ${this.rows.length} rows by ${section.x_label}. Arrow keys read cells.`,
    });
    this.canvas = element("div", { class: "canvas" });
    this.cell = element("div", { class: "cell" });
    this.hover = element("div", { class: "hover", "aria-live": "polite" });
    this.box.append(this.canvas, this.cell, this.hover);
    // Not only once it is near: what is below would move.
    this.drawLegend();
    this.box.style.height = `${this.layout(false).height}px`;
    this.box.addEventListener("pointermove", (event) => this.move(event));
    this.box.addEventListener("pointerdown", (event) => this.move(event));
    for (const end of ["pointercancel", "blur"]) this.box.addEventListener(end, () => this.hide());
    // A finger always leaves; what a tap shows stays until the next tap elsewhere.
    this.box.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") this.hide(); });
    this.box.addEventListener("keydown", (event) => this.key(event));
    return element("figure", {},
      ...caption(section.title),
      element("div", { class: "bar" }, this.legend, element("div", { class: "tools" }, save)),
      this.box);
  }

  /// Rows are high enough for their names, unless there are more than a canvas can hold.
  layout(isFile) {
    const rowHeight = Math.max(2, Math.min(17, 9000 / Math.max(1, this.rows.length)));
    const top = 30 + (isFile ? 44 : 0);
    const plotHeight = Math.max(20, rowHeight * this.rows.length);
    return { rowHeight: plotHeight / Math.max(1, this.rows.length), top, plotHeight, height: top + plotHeight + 52 };
  }

  draw() {
    const width = this.box.clientWidth;
    if (!width) return;
    const { height } = this.layout(false);
    // Some phones draw nothing on a canvas that is larger.
    this.ratio = Math.min(window.devicePixelRatio || 1, Math.sqrt(16e6 / (width * height)));
    this.chart ??= echarts.init(this.canvas, null, { renderer: "canvas", devicePixelRatio: this.ratio });
    this.chart.resize({ width, height });
    this.hide();
    this.drawLegend();
    this.chart.setOption(this.option(width, false), { notMerge: true });
  }

  drawLegend() {
    const steps = SHADES.map(([r, g, b]) => `rgb(${r},${g},${b})`);
    const [low, high] = this.ends();
    const scale = element("span", { class: "scale" }, element("i", { style: `background:linear-gradient(90deg,${steps})` }),
      element("span", {}, low), element("span", {}, high));
    const states = this.states.map((state) => {
      const box = element("canvas", { width: 32, height: 16, "aria-hidden": "true" });
      const pen = box.getContext("2d");
      pen.fillStyle = pattern(pen, state);
      pen.fillRect(0, 0, 32, 16);
      return element("span", { class: "state" }, box, STATES[state].text);
    });
    const colors = this.isEmpty ? [element("span", { class: "state" }, `${this.section.value_label}: no values above 0`)]
      : [element("span", { class: "state" }, `${this.section.value_label}, log scale`), scale];
    this.legend.replaceChildren(...colors, ...states);
  }

  /// All cells as one picture, in whole pixels of the screen.
  paint(width, height) {
    const picture = element("canvas", { width, height });
    const pen = picture.getContext("2d");
    const patterns = Object.fromEntries(this.states.map((state) => [state, pattern(pen, state)]));
    const [low, high] = this.range;
    const columns = Math.max(1, this.section.columns.length);
    const edge = (i, of, size) => Math.round((i / of) * size);
    this.rows.forEach(({ cells }, row) => {
      const [top, bottom] = [edge(row, this.rows.length, height), edge(row + 1, this.rows.length, height)];
      const gap = bottom - top > 6 ? 1 : 0;
      for (let column = 0; column < columns; column++) {
        const cell = cells[column];
        const state = this.state(cell);
        const left = edge(column, columns, width);
        pen.fillStyle = state ? patterns[state] : `rgb(${shade((Math.log10(cell) - low) / (high - low))})`;
        pen.fillRect(left, top, Math.max(1, edge(column + 1, columns, width) - left), bottom - top - gap);
      }
    });
    return picture;
  }

  option(width, isFile) {
    const { rowHeight, top, plotHeight } = this.layout(isFile);
    const { section, rows } = this;
    const { soft, edge } = theme();
    const longest = Math.max(4, ...rows.map(({ name }) => [...name].length));
    const letters = Math.max(8, Math.min(longest, Math.floor((width * (width < 600 ? 0.36 : 0.34)) / 6.5)));
    const left = Math.round(letters * 6.5 + 12);
    const right = 16;
    const plotWidth = Math.max(10, width - left - right);
    // Where the pointer finds the cells on the screen.
    if (!isFile) Object.assign(this, { left, plotWidth });
    const ratio = isFile ? 2 : this.ratio;
    const picture = this.paint(Math.round(plotWidth * ratio), Math.round(plotHeight * ratio));
    const widest = Math.max(1, ...section.columns.map((column) => column.length)) * 6.8 + 14;
    const columnStep = roundStep((section.columns.length * widest) / plotWidth);
    const columnTicks = section.columns.map((_, i) => i).filter((i) => i % columnStep === 0).map((i) => i + 0.5);
    const rowStep = Math.ceil(12 / rowHeight);
    const rowTicks = rows.map((_, i) => i).filter((i) => i % rowStep === 0).map((i) => i + 0.5);
    const xAxis = (place) => ({
      type: "value", position: place, min: 0, max: Math.max(1, section.columns.length), splitLine: { show: false },
      name: place === "bottom" ? section.x_label : "", nameLocation: "middle", nameGap: 26, nameTextStyle: { color: soft, fontSize: 12.5 },
      axisLine: { show: true, onZero: false, lineStyle: { color: edge } }, axisTick: { show: true, customValues: columnTicks, lineStyle: { color: edge } },
      axisLabel: { customValues: columnTicks, color: soft, fontSize: 12, formatter: (at) => section.columns[Math.floor(at)] ?? "", showMinLabel: true, showMaxLabel: true },
    });
    return {
      animation: false, title: isFile ? this.fileTitle(width) : [], textStyle: { fontFamily: FONT },
      grid: { outerBoundsMode: "none", left, right, top, height: plotHeight },
      xAxis: [xAxis("bottom"), xAxis("top")],
      yAxis: {
        type: "value", inverse: true, min: 0, max: Math.max(1, rows.length), splitLine: { show: false },
        axisLine: { show: true, onZero: false, lineStyle: { color: edge } }, axisTick: { show: false, customValues: rowTicks },
        axisLabel: { customValues: rowTicks, color: soft, fontSize: 11.5, hideOverlap: false, showMinLabel: true, showMaxLabel: true, formatter: (at) => shortenPath(rows[Math.floor(at)]?.name ?? "", letters) },
      },
      series: [{
        type: "custom", silent: true, data: [[0, 0]],
        renderItem: ({ coordSys }) => ({ type: "image", style: { image: picture, x: coordSys.x, y: coordSys.y, width: coordSys.width, height: coordSys.height } }),
      }],
    };
  }

  /// Title and legend of a saved picture.
  fileTitle(width) {
    const { ink, soft } = theme();
    const text = (text, top, textStyle) => ({ text, left: 0, top, textStyle: { fontFamily: FONT, width: width - 10, overflow: "truncate", ...textStyle } });
    const [low, high] = this.ends();
    const states = this.states.map((state) => `; ${STATES[state].look}: ${STATES[state].text}`).join("");
    return [
      text(this.section.title, 4, { color: ink, fontSize: 16 }),
      text(`${this.section.value_label}, log scale: dark ${low} to light ${high}${states}`, 26, { color: soft, fontSize: 12.5, fontWeight: 400 }),
    ];
  }

  /// What the ends of the colours stand for.
  ends() {
    const [low, high] = this.range.map((at) => formatTick(Number((10 ** at).toPrecision(3))));
    return [`${this.outside[0] ? "≤ " : ""}${low}`, `${this.outside[1] ? "≥ " : ""}${high}`];
  }

  move(event) {
    const { left, top } = this.box.getBoundingClientRect();
    const layout = this.layout(false);
    const column = Math.floor(((event.clientX - left - this.left) / this.plotWidth) * this.section.columns.length);
    const row = Math.floor((event.clientY - top - layout.top) / layout.rowHeight);
    this.show(row, Math.max(0, column));
  }

  key(event) {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const step = steps[event.key];
    if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const inside = (at, count) => Math.max(0, Math.min(count - 1, at));
    const [row, column] = this.at ?? [0, 0];
    this.show(inside(row + step[0], this.rows.length), inside(column + step[1], this.section.columns.length));
  }

  show(row, column) {
    this.hide();
    const { section } = this;
    if (!this.chart || !this.rows[row] || section.columns[column] === undefined) return;
    this.at = [row, column];
    const { name, cells } = this.rows[row];
    const cell = cells[column];
    const { rowHeight, top } = this.layout(false);
    const width = this.plotWidth / section.columns.length;
    Object.assign(this.cell.style, { display: "block", left: `${this.left + column * width}px`, top: `${top + row * rowHeight}px`, width: `${width}px`, height: `${rowHeight}px` });
    const text = cell === null || cell === undefined ? "no value" : format(cell);
    this.hover.replaceChildren(element("b", {}, name), `${section.x_label} ${section.columns[column]}: ${section.value_label} ${text}`);
    placeHover(this.hover, this.box, this.left + (column + 1) * width, top + (row + 2.5) * rowHeight + 20);
  }

  hide() { this.cell.style.display = this.hover.style.display = "none"; }

  save() {
    const width = 900;
    saveSvg(this.section.title, this.option(width, true), width, this.layout(true).height);
  }
}

/// 1, 2, 5, 10, 20, ...: the first that is not below `least`.
function roundStep(least) {
  for (let power = 1; ; power *= 10) for (const times of [1, 2, 5]) if (times * power >= least) return times * power;
}
