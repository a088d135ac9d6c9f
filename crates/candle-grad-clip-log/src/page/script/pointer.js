// Hover, zoom and keys of a line chart.

class LinePointer {
  constructor(chart) {
    this.chart = chart;
    this.dragFrom = null;
    const { box } = chart;
    box.addEventListener("pointerdown", (event) => this.down(event));
    box.addEventListener("pointermove", (event) => this.move(event));
    box.addEventListener("pointerup", (event) => this.up(event));
    // A vertical swipe scrolls the page.
    box.addEventListener("pointercancel", () => { this.dragFrom = null; chart.hide(); });
    // A finger always leaves; what a tap shows stays until the next tap elsewhere.
    box.addEventListener("pointerleave", (event) => { if (this.dragFrom === null && event.pointerType !== "touch") chart.hide(); });
    box.addEventListener("dblclick", () => chart.zoom(null));
    box.addEventListener("blur", () => chart.hide());
    box.addEventListener("keydown", (event) => this.key(event));
  }

  place(event) {
    const { left, top } = this.chart.box.getBoundingClientRect();
    return [event.clientX - left, event.clientY - top];
  }

  /// Pixels to positions on the x axis and back.
  toX(pixel) {
    const [low, high] = this.chart.range();
    const { left, right, box } = this.chart;
    return low + ((pixel - left) / (box.clientWidth - left - right)) * (high - low);
  }
  toPixel(x) {
    const [low, high] = this.chart.range();
    const { left, right, box } = this.chart;
    return left + ((x - low) / (high - low)) * (box.clientWidth - left - right);
  }
  clamp(pixel) { return Math.max(this.chart.left, Math.min(this.chart.box.clientWidth - this.chart.right, pixel)); }

  down(event) {
    if (event.button !== 0 || !this.chart.chart) return;
    const [x, y] = this.place(event);
    this.dragFrom = this.clamp(x);
    this.show(this.dragFrom, y);
    try { this.chart.box.setPointerCapture(event.pointerId); } catch { /* it is gone already */ }
  }

  move(event) {
    if (!this.chart.chart) return;
    const [x, y] = this.place(event);
    if (this.dragFrom !== null && Math.abs(x - this.dragFrom) > 4) {
      this.chart.hide();
      const [from, to] = [this.dragFrom, this.clamp(x)].sort((a, b) => a - b);
      Object.assign(this.chart.selection.style, { display: "block", left: `${from}px`, width: `${to - from}px`, ...this.plotHeight() });
    } else {
      this.show(this.clamp(x), y);
    }
  }

  up(event) {
    const from = this.dragFrom;
    this.dragFrom = null;
    if (from === null) return;
    const to = this.clamp(this.place(event)[0]);
    this.chart.selection.style.display = "none";
    if (Math.abs(to - from) > 6) this.chart.zoom([this.toX(Math.min(from, to)), this.toX(Math.max(from, to))]);
  }

  plotHeight() {
    const { panels } = this.chart.layout(false);
    const last = panels[panels.length - 1];
    return { top: `${panels[0].top}px`, height: `${last.top + last.height - panels[0].top}px` };
  }

  key(event) {
    if (!this.chart.chart || event.ctrlKey || event.metaKey || event.altKey) return;
    const [low, high] = this.chart.range();
    const middle = this.at ?? (low + high) / 2;
    const zoomBy = (factor) => {
      const [least, most] = this.chart.fullRange();
      const half = ((high - low) * factor) / 2;
      this.chart.zoom(2 * half >= most - least ? null : [Math.max(least, middle - half), Math.min(most, middle + half)]);
    };
    const actions = {
      ArrowLeft: () => this.step(-1), ArrowRight: () => this.step(1),
      "+": () => zoomBy(0.5), "=": () => zoomBy(0.5), "-": () => zoomBy(2),
      Escape: () => this.chart.zoom(null),
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }

  /// To the next place with a point, at least some pixels away.
  step(direction) {
    const [low, high] = this.chart.range();
    const start = this.at ?? (direction > 0 ? low : high);
    const least = direction * Math.max(1e-12, (high - low) / 200);
    const xs = this.shownLines().map((line) => {
      const near = lowerBound(line.xs, start + least);
      return line.xs[direction > 0 ? near : near - 1];
    }).filter((x) => x >= low && x <= high);
    if (xs.length) this.show(this.toPixel(direction > 0 ? Math.min(...xs) : Math.max(...xs)), 40);
  }

  shownLines() {
    const { panels, names } = this.chart;
    // A faint line is listed only where no other line has its name.
    return panels.flatMap((panel) => this.chart.visible(panel)).filter((line) => !line.faint || names.get(line.name).faint);
  }

  /// The point of a line that is nearest to x, in the zoom; on an axis of names, at the same name.
  nearest(line, x) {
    const hasNames = this.chart.section.x_names.length > 0;
    const [low, high] = hasNames ? [Math.round(x) - 0.5, Math.round(x) + 0.5] : this.chart.range();
    let after = lowerBound(line.xs, x);
    let before = after - 1;
    while (after < line.xs.length && !line.isPlace(after)) after++;
    while (before >= 0 && !line.isPlace(before)) before--;
    const near = [before, after].filter((i) => line.xs[i] >= low && line.xs[i] <= high);
    return near.sort((a, b) => Math.abs(line.xs[a] - x) - Math.abs(line.xs[b] - x))[0];
  }

  show(pixel, y) {
    const { chart } = this;
    const { section } = chart;
    chart.hide();
    const x = this.toX(pixel);
    const found = this.shownLines().map((line) => ({ line, i: this.nearest(line, x) })).filter(({ i }) => i !== undefined);
    if (!found.length) return;
    const listed = this.listed(found, y);
    const away = ({ line, i }) => Math.abs(line.xs[i] - x);
    const at = found.reduce((best, one) => (away(one) < away(best) ? one : best));
    this.at = at.line.xs[at.i];
    const cursor = this.toPixel(this.at);
    Object.assign(chart.cursor.style, { display: "block", left: `${cursor}px`, ...this.plotHeight() });
    const name = (x) => section.x_names[Math.round(x)] ?? format(Number(valueAt(x, section.x_log).toPrecision(12)));
    const rows = [];
    for (const panel of chart.panels) {
      const here = listed.filter(({ line }) => line.panel === panel);
      if (!here.length) continue;
      if (chart.panels.length > 1) rows.push(element("tr", {}, element("th", { colspan: 3 }, panel.heading)));
      for (const { line, i } of here) {
        const isElsewhere = Math.abs(this.toPixel(line.xs[i]) - cursor) > 4;
        const where = isElsewhere && !section.x_names.length ? [" ", element("small", {}, `at ${name(line.xs[i])}`)] : [];
        rows.push(element("tr", {}, element("td", {}, swatch(line)), element("td", {}, shorten(line.name, chart.box.clientWidth < 600 ? 24 : 48), ...where), element("td", {}, format(line.ys[i]))));
        this.dot(line, i);
      }
    }
    if (found.length > listed.length) rows.push(element("tr", {}, element("th", { colspan: 3 }, `and ${found.length - listed.length} lines farther away`)));
    chart.hover.replaceChildren(element("b", {}, section.x_names.length ? name(this.at) : `${section.x_label} ${name(this.at)}`), element("table", {}, ...rows));
    placeHover(chart.hover, chart.box, cursor, y);
  }

  /// Of more lines than a reader wants to see at once: those next to the pointer.
  listed(found, y) {
    const most = 12;
    if (found.length <= most) return found;
    const away = ({ line, i }) => Math.abs((this.pixels(line, i)[1] || 0) - y);
    const near = found.map((one) => ({ one, away: away(one) })).sort((a, b) => a.away - b.away).slice(0, most);
    return found.filter((one) => near.some((other) => other.one === one));
  }

  /// Where a point of a line is on the screen.
  pixels(line, i) {
    const { index } = line.panel;
    const at = [line.xs[i], position(line.ys[i], this.chart.isLog(line.panel))];
    return this.chart.chart.convertToPixel({ xAxisIndex: index, yAxisIndex: index }, at);
  }

  dot(line, i) {
    const { chart } = this;
    const [x, y] = this.pixels(line, i);
    const { top, height } = chart.layout(false).panels[line.panel.index];
    if (!(y >= top && y <= top + height)) return;
    const free = [...chart.box.querySelectorAll(".dot")].find((dot) => dot.style.display === "none");
    const dot = free ?? element("div", { class: "dot" });
    if (!free) chart.box.insertBefore(dot, chart.hover);
    Object.assign(dot.style, { display: "block", left: `${x}px`, top: `${y}px`, background: color(line.style) });
  }
}

/// Beside a place, inside its box.
function placeHover(hover, box, x, y) {
  hover.style.display = "block";
  const { clientWidth, clientHeight } = box;
  const { offsetWidth, offsetHeight } = hover;
  const right = x + 16;
  const left = right + offsetWidth <= clientWidth ? right : x - 16 - offsetWidth;
  hover.style.left = `${Math.max(0, Math.min(clientWidth - offsetWidth, left))}px`;
  hover.style.top = `${Math.max(0, Math.min(clientHeight - offsetHeight, y - offsetHeight / 2))}px`;
}
