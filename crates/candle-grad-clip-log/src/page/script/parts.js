// Text, tables and links.

const MARKS = { good: ["✓", "Good: "], warning: ["!", "Look at this: "] };

function textPart({ text, mark }) {
  if (!MARKS[mark]) return element("p", { class: "text" }, text);
  const [sign, spoken] = MARKS[mark];
  return element("p", { class: `text ${mark}` }, element("span", { class: "sign", role: "img", "aria-label": spoken }, sign), element("span", {}, text));
}

/// Only relative addresses become links: no script, no other site.
function linksPart({ links }) {
  const item = ([text, href]) => element("li", {}, /^[a-z][a-z0-9+.-]*:|^[\\/]{2}/i.test(href.trim()) ? text : element("a", { href }, text));
  return element("ul", { class: "links" }, ...links.map(item));
}

/// The number that a cell shows, NaN where it shows none, undefined where it is text.
function cellNumber(text) {
  const plain = text.trim().replace(/\s*%$/, "").replace(/^−/, "-");
  if (["", "-", "–", "—", "NaN", "nan"].includes(plain)) return NaN;
  if (/^[-+]?inf(inity)?$|^[-+]?∞$/i.test(plain)) return plain.startsWith("-") ? -Infinity : Infinity;
  const digits = /^[-+]?\d{1,3}(,\d{3})+(\.\d+)?$/.test(plain) ? plain.replaceAll(",", "") : plain;
  return /^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$/i.test(digits) ? Number(digits) : undefined;
}

function tablePart({ title, columns, rows }, key) {
  const set = memory.part(key);
  const numbers = columns.map((_, column) => rows.map((row) => cellNumber(row[column] ?? "")));
  const isNumeric = numbers.map((column) => column.every((value) => value !== undefined) && column.some((value) => !Number.isNaN(value)));
  const body = element("tbody");
  const heads = columns.map((name, column) => element("th", { scope: "col", class: isNumeric[column] && "number" },
    element("button", { type: "button", onclick: () => sort(column) }, name)));

  function draw() {
    const order = rows.map((_, i) => i);
    const { column, down } = set;
    if (column < columns.length) {
      const text = (i) => rows[i][column] ?? "";
      const value = (i) => numbers[column][i];
      order.sort((a, b) => {
        if (!isNumeric[column]) return (down ? -1 : 1) * text(a).localeCompare(text(b), "en", { numeric: true });
        // Cells without a number come last, whichever way.
        const missing = Number.isNaN(value(a)) - Number.isNaN(value(b));
        return missing || (value(a) === value(b) ? 0 : (down ? -1 : 1) * (value(a) < value(b) ? -1 : 1));
      });
    }
    heads.forEach((head, i) => head.setAttribute("aria-sort", i !== column ? "none" : down ? "descending" : "ascending"));
    body.replaceChildren(...order.map((i) => element("tr", {}, ...columns.map((_, c) => element("td", { class: isNumeric[c] && "number" }, rows[i][c] ?? "")))));
  }
  function sort(column) {
    // Of numbers, the large ones come first.
    set.down = set.column === column ? !set.down : isNumeric[column];
    set.column = column;
    memory.save();
    draw();
  }
  draw();
  const table = element("table", { class: "data" }, element("thead", {}, element("tr", {}, ...heads)), body);
  const id = `table-${key}`.replace(/\s+/g, "-");
  return element("figure", {},
    ...caption(title, id),
    rows.length ? element("div", { class: "scroll", tabindex: 0, role: "region", "aria-labelledby": id }, table) : element("p", { class: "empty" }, "Nothing yet."));
}
