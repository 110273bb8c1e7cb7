// One tensor, in a dialog that its address opens: #tensor=NAME.

const HASH = "#tensor=";
const addressOf = (row) => HASH + encodeURIComponent(row.name);

/** The row that the address names; null where it names none. */
function addressed(model) {
  if (!location.hash.startsWith(HASH)) return null;
  let name;
  try {
    name = decodeURIComponent(location.hash.slice(HASH.length));
  } catch {
    return null; // a cut or mistyped address
  }
  return model.rows.find((row) => row.name === name) ?? null;
}

/** `neighbour(row, step)`: the row before or after it in the table as it is sorted and filtered now, or null. */
function startDetails(model, found, neighbour) {
  const dialog = byId("details");
  let shown = null;
  const go = (step) => {
    const next = shown && neighbour(shown, step);
    if (next) location.replace(addressOf(next));
  };
  const show = () => {
    shown = addressed(model);
    if (!shown) {
      if (dialog.open) dialog.close();
      return;
    }
    fill(dialog, shown, found, { before: neighbour(shown, -1), after: neighbour(shown, 1), go });
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
  };
  dialog.addEventListener("close", () => {
    if (!location.hash.startsWith(HASH)) return;
    history.replaceState(null, "", location.pathname + location.search);
    byId("rows").querySelector(`[data-row="${shown?.index}"] a`)?.focus({ preventScroll: true });
  });
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") go(-1);
    if (event.key === "ArrowRight") go(1);
  });
  window.addEventListener("hashchange", show);
  show();
  return show;
}

function fill(dialog, row, found, { before, after, go }) {
  const step = (text, name, enabled, by) => {
    const button = el(
      "button",
      { type: "button", class: "quiet", "aria-label": name, title: name, disabled: !enabled },
      text,
    );
    button.addEventListener("click", () => go(by));
    return button;
  };
  const close = el(
    "button",
    { type: "button", class: "quiet", "aria-label": "Close", title: "Close (Esc)", autofocus: true },
    "✕",
  );
  close.addEventListener("click", () => dialog.close());
  const bar = el(
    "div",
    { class: "tools" },
    step("←", "Previous tensor", before, -1),
    step("→", "Next tensor", after, 1),
    close,
  );
  const chips = [
    row.format,
    row.layer === null ? null : `layer ${row.layer}`,
    row.kind || null,
    row.role === row.kind ? null : row.role,
  ];
  const head = el("header", {}, el("h2", { id: "details-title" }, row.name), bar);
  const line = el("p", { class: "chips" }, ...chips.filter(Boolean).map((chip) => el("span", {}, chip)));
  const sections = [facts("Tensor", tensorFacts(row))];
  if (row.error) sections.push(facts("Error against the reference", errorFacts(row.error)));
  if (row.estimates.size) sections.push(estimatesTable(row, found));
  if (row.values) sections.push(facts("Values", valueFacts(row.values)));
  const plots = el("div", { class: "charts" });
  dialog.replaceChildren(head, el("div", { class: "body" }, line, ...sections, plots));
  if (row.values?.codes.length) plotBlocks(plots, row);
}

function plotBlocks(plots, row) {
  const [scales, codes] = [newFigure("Block scales"), newFigure("Codes")];
  if (row.values.scales.length) plots.append(scales);
  plots.append(codes);
  if (row.values.scales.length) drawScales(scales, row.format, row.values.scales);
  drawCodes(codes, row.values.codes);
}

function facts(title, pairs) {
  const list = el("dl", {}, ...pairs.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  return el("section", {}, el("h3", {}, title), list);
}

function tensorFacts(row) {
  return [
    ["Shape", row.shape],
    ["Values", count(row.elements)],
    ["Size", `${size(row.bytes)} (${count(row.bytes)} B)`],
    ["Bits a weight", row.bits.toFixed(2)],
    ["File", row.file],
  ];
}

function valueFacts(values) {
  const pairs = [
    ["Smallest", number(values.smallest, 5)],
    ["Largest", number(values.largest, 5)],
    ["Zeros", count(values.zeros)],
    ["NaN and Inf", count(values.nan)],
  ];
  if (values.tensorScale !== null) pairs.push(["Tensor scale", number(values.tensorScale, 6)]);
  if (!values.blocks) return pairs;
  const blocks = (part) => `${count(part)} (${share(part, values.blocks)})`;
  return [
    ...pairs,
    ["Blocks", count(values.blocks)],
    ["Blocks of zeros", blocks(values.zeroBlocks)],
    ["Blocks with a value at ±6", blocks(values.saturated)],
    ["Half the scale would hold", blocks(values.unused)],
    ...faults(values).map(([name, part]) => [name, blocks(part)]),
  ];
}

/** What no block should have, so it is named only where there is some. */
function faults({ nanScales, negativeScales, deadBlocks }) {
  const all = [
    ["Blocks under a NaN scale", nanScales],
    ["Under a negative scale", negativeScales],
    ["Made zero by their scale", deadBlocks],
  ];
  return all.filter(([, part]) => part > 0);
}

function errorFacts(error) {
  return [
    ["SQNR", decibels(error, " dB")],
    ["MSE", number(mse(error), 4)],
    ["Largest error", number(error.maxAbs, 4)],
    ["Largest relative error", number(error.maxRel, 4)],
    ["Cosine", cosine(error).toFixed(8)],
    ["Values that differ", `${count(error.differ)} (${share(error.differ, error.values + error.leftOut)})`],
    ...(error.leftOut ? [["Left out, not finite", count(error.leftOut)]] : []),
  ];
}

function estimatesTable(row, found) {
  const offered = found.filter((measure) => measure.format && measure.of(row));
  const head = ["Format", "Scale rule", "SQNR, dB", "MSE", "Largest error"].map((title) =>
    el("th", { scope: "col" }, title),
  );
  const body = offered.map((measure) => {
    const error = measure.of(row);
    const figures = [decibels(error), number(mse(error)), number(error.maxAbs)];
    return el(
      "tr",
      {},
      el("td", {}, measure.format),
      el("td", {}, measure.rule),
      ...figures.map((text) => el("td", { class: "num" }, text)),
    );
  });
  const table = el("table", { class: "plain" }, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body));
  return el("section", {}, el("h3", {}, "What four bits would cost"), el("div", { class: "scroll" }, table));
}
