// The table of tensors. Only the rows in sight are in the document, so that 30,000 scroll like 30.

const ROW_HEIGHT = 34; // as page.css has it
const BESIDE = 12; // rows above and below those in sight
const MOST_PRINTED = 500;

/** Names in the order of their numbers: layer 2 before layer 10. */
const nameKey = (name) => name.replace(/\d+/g, (digits) => digits.padStart(9, "0"));

/** What can be shown: where `if` holds; on narrow screens what is `narrow`, and what is `wide` on wide ones only. */
function columnsOf(model, measure) {
  const blocks = model.rows.some((row) => row.values?.codes.length);
  const read = model.rows.some((row) => row.values);
  const nan = model.rows.some((row) => row.values?.nan);
  const layered = model.rows.some((row) => row.layer !== null);
  const of = (row) => (measure ? measure.of(row) : null);
  const inBlocks = (name) => (row) => (row.values?.blocks ? row.values[name] / row.values.blocks : null);
  const cost = (name) => (row) => (row.values?.blocks ? share(row.values[name], row.values.blocks) : "");
  const dB = (row) => (of(row) ? sqnr(of(row)) : null);
  return [
    { key: "name", title: "Name", narrow: true, sort: (row) => row.sortName, cell: nameCell },
    {
      key: "format",
      title: "Format",
      width: 76,
      narrow: !layered,
      sort: (row) => row.format,
      cell: (row) => row.format,
    },
    {
      key: "layer",
      title: "Layer",
      width: 60,
      num: true,
      narrow: true,
      if: layered,
      sort: (row) => row.layer,
      cell: (row) => (row.layer === null ? "" : `${row.layer}`),
    },
    { key: "kind", title: "Kind", width: 132, wide: true, sort: (row) => row.kind, cell: (row) => row.kind },
    { key: "shape", title: "Shape", width: 140, num: true, sort: (row) => row.elements, cell: (row) => row.shape },
    {
      key: "size",
      title: "Size",
      width: 74,
      num: true,
      narrow: !measure,
      sort: (row) => row.bytes,
      cell: (row) => size(row.bytes),
    },
    {
      key: "bits",
      title: "Bits",
      width: 64,
      num: true,
      sort: (row) => row.bits,
      cell: (row) => row.bits.toFixed(2),
      about: "Bits a weight, scales counted",
    },
    {
      key: "sqnr",
      title: "SQNR, dB",
      width: 86,
      num: true,
      narrow: true,
      if: Boolean(measure),
      sort: dB,
      cell: (row) => (of(row) ? decibels(of(row)) : ""),
      about: measure?.name,
    },
    {
      key: "error",
      title: "Max error",
      width: 90,
      num: true,
      if: Boolean(measure),
      sort: (row) => of(row)?.maxAbs ?? null,
      cell: (row) => (of(row) ? number(of(row).maxAbs) : ""),
      about: "Largest absolute error",
    },
    {
      key: "largest",
      title: "Range",
      width: 176,
      num: true,
      if: read && !blocks,
      sort: (row) => row.values && reach(row.values),
      cell: (row) => (row.values ? `${number(row.values.smallest)} … ${number(row.values.largest)}` : ""),
    },
    {
      key: "zero",
      title: "Zero",
      width: 70,
      num: true,
      if: blocks,
      sort: inBlocks("zeroBlocks"),
      cell: cost("zeroBlocks"),
      about: "Blocks of zeros",
    },
    {
      key: "full",
      title: "Full",
      width: 70,
      num: true,
      if: blocks,
      sort: inBlocks("saturated"),
      cell: cost("saturated"),
      about: "Blocks with a value at ±6, the largest code",
    },
    {
      key: "half",
      title: "Half",
      width: 70,
      num: true,
      if: blocks,
      sort: inBlocks("unused"),
      cell: cost("unused"),
      about: "Blocks that half the scale would hold",
    },
    {
      key: "nan",
      title: "NaN, Inf",
      width: 84,
      num: true,
      if: nan,
      sort: (row) => row.values?.nan ?? null,
      cell: (row) => (row.values?.nan ? count(row.values.nan) : ""),
    },
    {
      key: "scales",
      title: "Scales",
      width: 94,
      if: blocks,
      cell: scaleSpark,
      about: "Block scales, from the least to the largest",
    },
    { key: "codes", title: "Codes", width: 82, if: blocks, cell: codeSpark, about: "Codes, from \u22126 to 6" },
  ].filter((column) => column.if ?? true);
}

const reach = (values) => Math.max(Math.abs(values.smallest ?? 0), Math.abs(values.largest ?? 0));

/** The end of a name tells tensors apart, and an expert's number does: where room is short, the beginning is cut. */
function nameCell(row) {
  const words = row.name.split(".");
  const kept = /^\d+$/.test(words.at(-3)) ? 3 : 2;
  const cut = row.name.length - words.slice(-kept).join(".").length;
  const parts = [
    el("span", { class: "path" }, row.name.slice(0, cut)),
    el("span", { class: "leaf" }, row.name.slice(cut)),
  ];
  return el("a", { href: addressOf(row), title: row.name, class: "name" }, ...parts);
}

function scaleSpark(row) {
  if (!row.values?.scales.length) return "";
  const bins = scaleBins(row.format, row.values.scales);
  const each = Math.ceil(bins.length / 32);
  const counts = Array.from({ length: Math.ceil(bins.length / each) }, (_, place) =>
    bins.slice(place * each, (place + 1) * each).reduce((sum, bin) => sum + bin.blocks, 0),
  );
  return sparkline(counts, 80, 20, `scales from ${bins[0].label} to ${bins.at(-1).label}`);
}

function codeSpark(row) {
  if (!row.values?.codes.length) return "";
  return sparkline(
    CODE_ORDER.map((code) => row.values.codes[code]),
    66,
    20,
    "how often each code occurs",
  );
}

/** The table and its filters. Gives back what others need: a new measure, a filter from a plot, a row's neighbour. */
function startTable(model, firstOf) {
  for (const row of model.rows) row.sortName = nameKey(row.name);
  const scroller = byId("rows");
  const table = scroller.querySelector("table");
  const narrow = matchMedia("(max-width: 640px)");
  const wide = matchMedia("(min-width: 1480px)");
  const state = {
    measure: firstOf,
    columns: [],
    order: { key: null, down: false },
    rows: model.rows,
    first: -1,
    last: -1,
  };

  const setColumns = () => {
    state.narrow = narrow.matches;
    state.columns = columnsOf(model, state.measure).filter((column) =>
      narrow.matches ? column.narrow : wide.matches || !column.wide,
    );
    drawHead(table, state, sortBy);
    arrange();
  };
  const arrange = () => {
    state.rows = sorted(model.rows.filter(wanted()), state);
    state.first = -1;
    byId("shown").textContent =
      state.rows.length === model.rows.length
        ? count(model.rows.length)
        : `${count(state.rows.length)} of ${count(model.rows.length)}`;
    scroller.querySelector(".none").hidden = state.rows.length > 0;
    table.setAttribute("aria-rowcount", String(state.rows.length + 1));
    drawRows();
  };
  const sortBy = (key) => {
    const { order, columns } = state;
    const number = columns.find((column) => column.key === key).num;
    if (order.key !== key) state.order = { key, down: Boolean(number) && key !== "layer" && key !== "sqnr" };
    else state.order = { key, down: !order.down };
    markOrder(table, state.order);
    scroller.scrollTop = 0;
    arrange();
  };
  const drawRows = (all = false) => {
    const top = Math.floor(scroller.scrollTop / ROW_HEIGHT);
    const first = all ? 0 : Math.max(0, Math.min(top - BESIDE, state.rows.length - BESIDE));
    const sight = Math.ceil(scroller.clientHeight / ROW_HEIGHT) + 2 * BESIDE;
    const last = all ? Math.min(state.rows.length, MOST_PRINTED) : Math.min(state.rows.length, first + sight);
    if (first === state.first && last === state.last) return;
    Object.assign(state, { first, last });
    const body = state.rows.slice(first, last).map((row, place) => drawRow(row, first + place, state.columns));
    const rest = all ? 0 : state.rows.length - last;
    table.tBodies[0].replaceChildren(...gap(first, state), ...body, ...gap(rest, state));
  };

  startFilters(model, arrange, scroller);
  scroller.addEventListener("scroll", () => requestAnimationFrame(() => drawRows()), { passive: true });
  new ResizeObserver(() => drawRows()).observe(scroller);
  for (const media of [narrow, wide]) media.addEventListener("change", setColumns);
  table.tBodies[0].addEventListener("click", (event) => {
    const row = event.target.closest("tr[data-row]");
    if (row && !event.target.closest("a") && !String(getSelection()))
      location.hash = addressOf(model.rows[row.dataset.row]);
  });
  scroller.addEventListener("keydown", (event) => moveFocus(event, scroller, drawRows));
  window.addEventListener("beforeprint", () => {
    drawRows(true);
    const left = state.rows.length - Math.min(state.rows.length, MOST_PRINTED);
    byId("print-note").textContent = left ? `${count(left)} more tensors are not printed.` : "";
  });
  window.addEventListener("afterprint", () => drawRows());
  setColumns();
  return {
    measureBy(measure) {
      state.measure = measure;
      setColumns();
    },
    neighbour(row, step) {
      const place = state.rows.indexOf(row);
      return place < 0 ? null : (state.rows[place + step] ?? null);
    },
    only(filter) {
      setFilters(filter);
      arrange();
      byId("tensors").closest("section").scrollIntoView({ behavior: "smooth" });
    },
  };
}

function drawHead(table, state, sortBy) {
  const leastName = state.narrow ? 190 : 230;
  const widths = state.columns.map((column) => {
    const col = el("col");
    if (column.width) col.style.width = `${column.width}px`;
    return col;
  });
  table.querySelector("colgroup").replaceChildren(...widths);
  table.style.minWidth = `${state.columns.reduce((sum, column) => sum + (column.width ?? leastName), 0)}px`;
  const cells = state.columns.map((column) => {
    const attributes = {
      scope: "col",
      class: column.num ? "num" : null,
      "data-key": column.key,
      title: column.about ?? null,
    };
    if (!column.sort) return el("th", attributes, column.title);
    const button = el("button", { type: "button" }, column.title);
    button.addEventListener("click", () => sortBy(column.key));
    return el("th", attributes, button);
  });
  table.tHead.replaceChildren(el("tr", { "aria-rowindex": 1 }, ...cells));
  markOrder(table, state.order);
}

function markOrder(table, order) {
  for (const cell of table.tHead.rows[0].cells) {
    if (!cell.firstElementChild) continue;
    const direction = order.down ? "descending" : "ascending";
    cell.setAttribute("aria-sort", cell.dataset.key === order.key ? direction : "none");
  }
}

function drawRow(row, place, columns) {
  const cells = columns.map((column) => el("td", { class: column.num ? "num" : null }, column.cell(row)));
  return el("tr", { "data-row": row.index, "aria-rowindex": place + 2 }, ...cells);
}

/** Room for rows that are not in the document. */
function gap(rows, state) {
  if (!rows) return [];
  const cell = el("td", { colspan: state.columns.length });
  cell.style.height = `${rows * ROW_HEIGHT}px`;
  return [el("tr", { class: "gap", "aria-hidden": "true" }, cell)];
}

/** Rows without a figure come last, whichever way the others go; equals stay in the model's order. */
function sorted(rows, { order, columns }) {
  const by = columns.find((column) => column.key === order.key)?.sort;
  if (!by) return rows;
  const keyed = rows.map((row) => ({ row, key: by(row) }));
  const missing = (key) => key === null || key === undefined || Number.isNaN(key);
  const sign = order.down ? -1 : 1;
  const full = keyed.filter(({ key }) => !missing(key));
  full.sort((one, other) => sign * (one.key < other.key ? -1 : one.key > other.key ? 1 : 0));
  return [...full, ...keyed.filter(({ key }) => missing(key))].map(({ row }) => row);
}

const FILTERS = ["format", "layer", "kind"];
const NO_LAYER = "none";

function startFilters(model, arrange, scroller) {
  const options = {
    format: [...new Set(model.rows.map((row) => row.format))].sort(),
    layer: [...new Set(model.rows.map((row) => row.layer ?? NO_LAYER))].sort(
      (one, other) => one - other || (one === NO_LAYER ? 1 : -1),
    ),
    kind: [...new Set(model.rows.map((row) => row.kind))].sort(),
  };
  for (const name of FILTERS) {
    const named = options[name].map((value) =>
      el("option", { value: `=${value}` }, value === NO_LAYER ? "outside of layers" : `${value}`),
    );
    byId(`of-${name}`).replaceChildren(el("option", { value: "" }, "all"), ...named);
    byId(`of-${name}`).closest("label").hidden = options[name].length < 2;
  }
  const form = byId("filters");
  const again = () => {
    scroller.scrollTop = 0;
    arrange();
  };
  form.addEventListener("input", again);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(again)); // the fields are empty after the event
}

function setFilters(filter) {
  byId("find").value = "";
  for (const name of FILTERS) byId(`of-${name}`).value = name in filter ? `=${filter[name]}` : "";
}

/** Whether a row is one that the filters let through. Text without * and ? is looked for anywhere in the name. */
function wanted() {
  const text = byId("find").value.trim().toLowerCase();
  const glob = /[*?]/.test(text) ? globbed(text) : null;
  const chosen = FILTERS.map((name) => [name, byId(`of-${name}`).value]).filter(([, value]) => value !== "");
  return (row) =>
    (glob ? glob.test(row.name.toLowerCase()) : row.name.toLowerCase().includes(text)) &&
    chosen.every(([name, value]) => `=${row[name] ?? NO_LAYER}` === value);
}

function globbed(text) {
  const source = text
    .replace(/[.+^${}()|[\]\\]/g, "\\$&")
    .replaceAll("?", ".")
    .replace(/\*+/g, ".*");
  return new RegExp(`^${source}$`, "s");
}

/** Up and down go from name to name, and bring the next into sight. */
function moveFocus(event, scroller, drawRows) {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const row = document.activeElement?.closest("tr[data-row]");
  if (!step || !row) return;
  event.preventDefault();
  const index = Number(row.getAttribute("aria-rowindex")) + step;
  const top = (index - 2) * ROW_HEIGHT;
  const room = scroller.clientHeight - 2 * ROW_HEIGHT; // the head stays in sight
  if (top < scroller.scrollTop) scroller.scrollTop = top;
  else if (top > scroller.scrollTop + room) scroller.scrollTop = top - room;
  drawRows();
  scroller.querySelector(`[aria-rowindex="${index}"] a`)?.focus({ preventScroll: true });
}
