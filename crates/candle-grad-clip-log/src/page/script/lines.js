// Line charts: panels that share x, zoom and legend.

const PANEL_GAP = 36;
const X_AXIS_HEIGHT = 46;

/// The first place in sorted `xs` that is not below `x`.
function lowerBound(xs, x) {
  let [low, high] = [0, xs.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1; else high = middle;
  }
  return low;
}

class LineChart {
  constructor(section, key) {
    this.section = section;
    /// What the reader has set: hidden names, log by panel, the zoom as [x, x].
    this.set = memory.part(key);
    this.set.hidden ??= [];
    this.set.log ??= {};
    this.panels = section.panels.map((panel, index) => ({
      ...panel, index, heading: [panel.title, panel.y_label].filter(Boolean).join(" · "),
    }));
    this.lines = this.panels.flatMap((panel) => panel.lines.map((line) => this.prepare(line, panel)));
    // Between steps there is no tick.
    this.isWhole = !section.x_log && this.lines.every((line) => line.xs.every((x) => Number.isInteger(x) || x === -Infinity));
    this.names = new Map();
    for (const line of this.lines) {
      const shown = this.names.get(line.name);
      if (!shown || (shown.faint && !line.faint)) this.names.set(line.name, line);
    }
    this.element = this.build();
    drawWhenNear(this.box, () => this.draw());
  }

  prepare(line, panel) {
    const count = line.points.length / 2;
    const [xs, ys] = [new Float64Array(count), new Float64Array(count)];
    let before = -Infinity;
    for (let i = 0; i < count; i++) {
      const x = line.points[2 * i];
      // A point without x is a gap at the x before it.
      xs[i] = x === null ? before : position(x, this.section.x_log);
      ys[i] = x === null || Number.isNaN(xs[i]) ? NaN : number(line.points[2 * i + 1]);
      if (Number.isNaN(xs[i])) xs[i] = before;
      before = xs[i];
    }
    const isPlace = (i) => line.points[2 * i] !== null && Number.isFinite(position(line.points[2 * i], this.section.x_log));
    // Where y is not finite though there is an x.
    const odd = [];
    for (let i = 0; i < count; i++) if (!Number.isFinite(ys[i]) && isPlace(i)) odd.push(i);
    return { ...line, panel, xs, ys, odd, isPlace };
  }

  build() {
    const { section, panels } = this;
    this.legend = element("div", { class: "legend lines", role: "group", "aria-label": "lines shown" });
    this.resetButton = element("button", { type: "button", onclick: () => this.zoom(null) }, "Reset zoom");
    const switches = panels.map((panel) => {
      const input = element("input", { type: "checkbox", onchange: () => {
        this.set.log[panel.heading] = input.checked;
        this.changed();
      } });
      input.checked = this.isLog(panel);
      const text = panels.length > 1 ? `log ${shorten(panel.y_label || panel.title, 24)}` : "log scale";
      return element("label", { class: "switch" }, input, text);
    });
    const save = element("button", { type: "button", onclick: () => this.save() }, "Save SVG");
    this.box = element("div", {
      class: "chart", tabindex: 0, role: "group", "aria-roledescription": "line chart",
      "aria-label": `${section.title}: ${[...this.names.keys()].join(", ")}, by ${section.x_label}. `
        + "Left and right arrow read values, plus and minus zoom, Escape shows all.",
    });
    this.canvas = element("div", { class: "canvas" });
    this.cursor = element("div", { class: "cursor" });
    this.selection = element("div", { class: "selection" });
    this.hover = element("div", { class: "hover", "aria-live": "polite" });
    this.box.append(this.canvas, this.selection, this.cursor, this.hover);
    this.box.style.height = `${this.layout(false).height}px`;
    new LinePointer(this);
    // Not only once it is near: what is below would move.
    this.drawLegend();
    return element("figure", {},
      ...caption(section.title),
      element("div", { class: "bar" }, this.legend, element("div", { class: "tools" }, ...switches, this.resetButton, save)),
      this.box);
  }

  isLog(panel) { return this.set.log[panel.heading] ?? panel.y_log; }
  visible(panel) { return this.lines.filter((line) => line.panel === panel && !this.set.hidden.includes(line.name)); }

  /// Where panels are, in pixels from the top.
  layout(isFile) {
    const count = this.panels.length;
    const height = count === 1 ? 290 : count === 2 ? 215 : 165;
    const top = 26 + (isFile ? 60 : 0);
    const panels = this.panels.map((_, index) => ({ top: top + index * (height + PANEL_GAP), height }));
    // Names may take three lines.
    const axis = X_AXIS_HEIGHT + (this.section.x_names.length ? 28 : 0);
    return { panels, height: top + count * (height + PANEL_GAP) - PANEL_GAP + axis };
  }

  /// The positions on the x axis that all lines together span.
  fullRange() {
    if (this.section.x_names.length) return [-0.5, this.section.x_names.length - 0.5];
    const ends = [];
    for (const line of this.lines) {
      if (this.set.hidden.includes(line.name)) continue;
      for (const x of [line.xs.find(Number.isFinite), line.xs[line.xs.length - 1]]) if (Number.isFinite(x)) ends.push(x);
    }
    // No trimming: x has no outliers.
    return rangeOf(ends, false, 0.015);
  }

  range() { return this.set.zoom ?? this.fullRange(); }

  zoom(range) {
    if (range && !(range[1] - range[0] > 1e-9 * Math.max(1e-3, Math.abs(range[0]), Math.abs(range[1])))) return;
    this.set.zoom = range ?? undefined;
    this.changed();
  }

  changed() {
    memory.save();
    this.hide();
    this.draw();
  }

  draw() {
    const width = this.box.clientWidth;
    if (!width) return;
    this.chart ??= echarts.init(this.canvas, null, { renderer: "canvas" });
    this.chart.resize({ width, height: this.layout(false).height });
    this.chart.setOption(this.option(width, false), { notMerge: true });
    this.resetButton.disabled = !this.set.zoom;
    this.drawLegend();
  }

  drawLegend() {
    const entries = [...this.names].map(([name, line]) => element("button", {
      type: "button", "aria-pressed": String(!this.set.hidden.includes(name)), title: "Show or hide",
      onclick: () => this.toggle(name),
    }, swatch(line), name));
    const focused = [...this.legend.children].indexOf(document.activeElement);
    this.legend.replaceChildren(...entries);
    this.legend.children[focused]?.focus();
  }

  toggle(name) {
    const { hidden } = this.set;
    if (hidden.includes(name)) hidden.splice(hidden.indexOf(name), 1); else hidden.push(name);
    this.changed();
  }

  save() {
    const width = 900;
    saveSvg(this.section.title, this.option(width, true), width, this.layout(true).height);
  }

  option(width, isFile) {
    const layout = this.layout(isFile);
    const xRange = this.range();
    const shown = this.panels.map((panel, index) => new DrawnPanel(this, panel, layout.panels[index], xRange));
    const left = 14 + 6.6 * Math.max(3, ...shown.flatMap((panel) => panel.ticks.map((at) => panel.label(at).length)));
    const right = 26;
    const plotWidth = width - left - right;
    // Where the pointer finds the panels on the screen.
    if (!isFile) Object.assign(this, { left, right });
    const { ink, soft } = theme();
    const title = shown.map((panel) => ({
      text: panel.heading, left: 0, top: panel.place.top - 24, padding: 2,
      textStyle: { color: soft, fontSize: 12.5, fontWeight: 600, fontFamily: FONT, width: width - 8, overflow: "truncate" },
    }));
    if (isFile) title.push({ text: this.section.title, left: 0, top: 4, textStyle: { color: ink, fontSize: 16, fontFamily: FONT, width: width - 8, overflow: "truncate" } });
    return {
      animation: false, title,
      textStyle: { fontFamily: FONT },
      legend: { show: isFile, type: "scroll", top: 32, left: 0, itemWidth: 30, textStyle: { color: ink, fontSize: 12.5 }, data: [...this.names.keys()] },
      grid: shown.map((panel) => ({ outerBoundsMode: "none", left, right, top: panel.place.top, height: panel.place.height })),
      xAxis: shown.map((panel, index) => this.xAxis(index, xRange, plotWidth)),
      yAxis: shown.map((panel, index) => panel.yAxis(index)),
      series: shown.flatMap((panel, index) => panel.series(index, plotWidth)),
    };
  }

  xAxis(index, range, plotWidth) {
    const { x_names: names, x_log: log, x_label } = this.section;
    const { soft, grid, edge } = theme();
    const isLast = index === this.panels.length - 1;
    const ticks = names.length ? names.map((_, place) => place).filter((at) => at >= range[0] && at <= range[1])
      : ticksIn(range, log, plotWidth / 85).filter((at) => !this.isWhole || Number.isInteger(at));
    const room = plotWidth / Math.max(1, ticks.length) - 8;
    const wraps = names.some((name) => name.length * 6.8 > room);
    return {
      gridIndex: index, type: "value", min: range[0], max: range[1],
      name: isLast ? x_label : "", nameLocation: "middle", nameGap: wraps ? 54 : 28, nameTextStyle: { color: soft, fontSize: 12.5 },
      axisLine: { onZero: false, lineStyle: { color: edge } },
      axisTick: { customValues: ticks, lineStyle: { color: edge } },
      axisLabel: {
        show: isLast, customValues: ticks, color: soft, fontSize: 12, hideOverlap: true, showMinLabel: true, showMaxLabel: true,
        ...(names.length && { width: room, overflow: "break", lineHeight: 14 }),
        formatter: (at) => (names.length ? names[Math.round(at)] ?? "" : axisLabel(at, log, range)),
      },
      splitLine: { show: !names.length, lineStyle: { color: grid } },
    };
  }

  hide() {
    for (const part of [this.cursor, this.hover, this.selection, ...this.box.querySelectorAll(".dot")]) part.style.display = "none";
  }
}

/// One panel of a chart, with the y range that shows what is inside the zoom.
class DrawnPanel {
  constructor(chart, panel, place, xRange) {
    this.heading = panel.heading;
    this.place = place;
    this.levels = panel.levels;
    this.log = chart.isLog(panel);
    this.xRange = xRange;
    const positions = [];
    this.lines = chart.visible(panel).map((line) => {
      const from = Math.max(0, lowerBound(line.xs, xRange[0]) - 1);
      const to = Math.min(line.xs.length, lowerBound(line.xs, xRange[1]) + 2);
      const points = [];
      for (let i = from; i < to; i++) {
        const at = position(line.ys[i], this.log);
        points.push([line.xs[i], at]);
        const isInside = line.xs[i] >= xRange[0] && line.xs[i] <= xRange[1];
        if (!Number.isNaN(at) && (isInside || to - from <= 3)) positions.push(at);
      }
      return { ...line, points, from };
    });
    for (const [, level] of this.levels) {
      const at = position(number(level), this.log);
      if (!Number.isNaN(at)) positions.push(at);
    }
    this.range = rangeOf(positions, this.log);
    this.ticks = ticksIn(this.range, this.log, place.height / 38);
    if (!positions.length) {
      this.ticks = [];
      this.heading += this.log ? " (no values above 0)" : " (no values)";
    }
  }

  label(at) { return axisLabel(at, this.log, this.range); }

  yAxis(index) {
    const { soft, grid, edge } = theme();
    return {
      gridIndex: index, type: "value", min: this.range[0], max: this.range[1],
      axisLine: { show: true, onZero: false, lineStyle: { color: edge } },
      axisTick: { show: true, customValues: this.ticks, lineStyle: { color: edge } },
      axisLabel: { customValues: this.ticks, color: soft, fontSize: 12, formatter: (at) => this.label(at), showMinLabel: true, showMaxLabel: true },
      splitLine: { lineStyle: { color: grid } },
    };
  }

  series(index, plotWidth) {
    const axes = { xAxisIndex: index, yAxisIndex: index, silent: true };
    // Faint lines lie behind all others.
    // Where there is more than a point a pixel, lines are fields that would hide each other.
    const isDense = ({ points }) => points.length > 2 * plotWidth;
    const lines = this.lines.flatMap((line) => [{
      ...axes, type: "line", name: line.name, data: line.points, z: line.faint ? 1 : 2,
      symbol: `path://${symbol(line.style)}`, symbolSize: 8, showSymbol: false,
      itemStyle: { color: color(line.style) },
      lineStyle: { width: line.faint || isDense(line) ? 1 : 1.8, opacity: line.faint ? 0.4 : isDense(line) ? 0.6 : 1, color: color(line.style), type: isDense(line) ? "solid" : dash(line), join: "round" },
    }, {
      ...axes, type: "scatter", name: line.name, data: this.marked(line, plotWidth), z: 3,
      symbol: `path://${symbol(line.style)}`, symbolSize: line.faint ? 4 : 8,
      itemStyle: { color: isHollow(line.style) ? theme().back : color(line.style), borderColor: color(line.style), borderWidth: 1.2, opacity: line.faint ? 0.5 : 1 },
    }, this.crosses(line, axes)]);
    return [...lines, this.levelLines(axes)];
  }

  /// The points with a symbol: all, if the line has markers and there is room; else a few, and
  /// those without neighbours, which a line does not show.
  marked(line, plotWidth) {
    const { points } = line;
    const isThere = (i) => i >= 0 && i < points.length && !Number.isNaN(points[i][1]);
    const all = points.map((_, i) => i).filter(isThere);
    if (line.markers && all.length <= plotWidth / 12) return all.map((i) => points[i]);
    const alone = all.filter((i) => !isThere(i - 1) && !isThere(i + 1)).slice(0, 300).map((i) => points[i]);
    if (line.faint) return alone;
    const [low, high] = this.xRange;
    const count = Math.max(2, Math.round(plotWidth / 180));
    const few = [];
    for (let i = 0; i < count; i++) {
      // Moved by line, so that symbols do not hide each other.
      const x = low + ((i + 0.15 + 0.7 * (line.style % 7) / 6) / count) * (high - low);
      const near = lowerBound(line.xs, x) - line.from;
      if (isThere(near) && points[near][0] - x < (high - low) / count / 4) few.push(points[near]);
    }
    return [...alone, ...few];
  }

  /// A cross at the edge for each NaN or infinity: negative infinity is at the lower one.
  crosses(line, axes) {
    const data = line.odd.map((i) => [line.xs[i], line.ys[i] === -Infinity ? 1 : 0]);
    const inside = data.filter(([x]) => x >= this.xRange[0] && x <= this.xRange[1]);
    const below = 7 + 9 * (this.lines.filter((other) => other.odd.length).findIndex((other) => other.name === line.name) % 4);
    let before = -Infinity;
    return {
      ...axes, type: "custom", data: inside, z: 4,
      renderItem: ({ coordSys, dataIndex }, api) => {
        const [x] = api.coord([api.value(0), 0]);
        if (dataIndex === 0) before = -Infinity;
        // One for many that lie upon each other.
        if (x - before < 14) return null;
        before = x;
        const y = api.value(1) ? coordSys.y + coordSys.height - below : coordSys.y + below;
        return { type: "path", shape: { pathData: "M-4,-4L4,4M-4,4L4,-4" }, x, y, style: { stroke: color(line.style), lineWidth: 2.2, fill: "none" } };
      },
    };
  }

  levelLines(axes) {
    const { soft, back } = theme();
    const data = this.levels.map(([name, level]) => ({ name, yAxis: position(number(level), this.log) }));
    return {
      ...axes, type: "line", data: [], markLine: {
        silent: true, symbol: "none", animation: false,
        data: data.filter((level) => !Number.isNaN(level.yAxis)),
        lineStyle: { color: soft, width: 1.2, type: [3, 3] },
        label: { formatter: ({ name }) => name, position: "insideStartTop", color: soft, fontSize: 11.5, backgroundColor: `${back}b0`, padding: [0, 3], borderRadius: 3, distance: 2, lineHeight: 15 },
      },
    };
  }
}
