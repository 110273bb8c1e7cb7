// The head of the page: what it is, in a few numbers, and what each conversion would cost.

/**
 * The errors that can be looked at: that against the reference, and that of each conversion. `of` is a tensor's error;
 * `counted` the same, but null where tensors are equal to the reference: norms and embeddings that were left as they
 * are would make the rest look better than it is.
 */
function measures(model) {
  const found = [];
  if (model.rows.some((row) => row.error !== null)) {
    const reference = model.reference === null ? "the reference" : lastPart(model.reference);
    const counted = (row) => (row.error?.differ ? row.error : null);
    found.push({ name: `this checkpoint against ${reference}`, of: (row) => row.error, counted });
  }
  model.conversions.forEach(({ format, rule }, place) => {
    const of = (row) => row.estimates.get(place) ?? null;
    found.push({ name: `a conversion to ${format}, ${rule}`, format, rule, of, counted: of });
  });
  for (const measure of found) {
    measure.all = together(model.rows.map(measure.of));
    measure.total = together(model.rows.map(measure.counted)) ?? measure.all;
  }
  return found;
}

/** What to show first: the reference, or else the conversion that loses least. */
function firstMeasure(found) {
  if (!found.length || !found[0].format) return 0;
  const sizes = found.map((measure) => (measure.total ? sqnr(measure.total) : -Infinity));
  return sizes.indexOf(Math.max(...sizes));
}

/** The folder's own name, which is what people call it. */
const lastPart = (path) => path.replace(/\/+$/, "").split("/").pop() || path;

function showHead(model) {
  const compared = model.reference === null ? null : `compared with ${lastPart(model.reference)}`;
  byId("source").textContent = lastPart(model.source);
  byId("source").title = model.source;
  byId("subtitle").textContent = [model.format, `${model.layout} layout`, `family ${model.family}`, compared]
    .filter(Boolean)
    .join(" · ");
  byId("made").textContent = `fp4conv ${model.version}`;
  const warnings = byId("warnings");
  warnings.hidden = !model.warnings.length;
  warnings.querySelector("ul").append(...model.warnings.map((warning) => el("li", {}, warning)));
}

function card(title, value, note = null, attributes = {}) {
  return el(
    "div",
    { class: "card", ...attributes },
    el("p", { class: "label" }, title),
    el("p", { class: "value" }, value),
    note && el("p", { class: "detail" }, note),
  );
}

function showCards(model, found) {
  const layers = new Set(model.rows.map((row) => row.layer).filter((layer) => layer !== null)).size;
  const cards = [
    card("Parameters", short(model.parameters), count(model.parameters)),
    card("Size", size(model.bytes), `${model.bits_per_weight.toFixed(2)} bits a weight`),
    card("Tensors", count(model.rows.length), layers ? `${count(layers)} layers` : null),
    ...errorCards(found),
    ...blockCards(model),
    formatsCard(model),
  ];
  byId("cards").replaceChildren(...cards);
}

function errorCards(found) {
  if (!found.length || found[0].format || !found[0].total) return [];
  const { total, all } = found[0];
  const rest = total.differ ? `${decibels(all, " dB")} over all tensors` : "every value is equal";
  return [card("SQNR", decibels(total, " dB"), rest, { class: "card strong" })];
}

function blockCards(model) {
  const known = model.rows.map((row) => row.values).filter((values) => values !== null);
  if (!known.length) return [];
  const sum = (name) => known.reduce((total, values) => total + values[name], 0);
  const [nan, faults] = [sum("nan"), sum("nanScales") + sum("negativeScales") + sum("deadBlocks")];
  const blocks = sum("blocks");
  const part = (name) => share(sum(name), blocks).replace(/^0$/, "0 %");
  const cards = [];
  if (blocks) {
    cards.push(
      card(
        "Blocks at full range",
        share(sum("saturated"), blocks),
        `${part("zeroBlocks")} zero, ${part("unused")} use half`,
      ),
    );
  }
  const told = faults
    ? `${count(faults)} blocks under a scale that breaks them`
    : nan
      ? "sort the table by NaN"
      : "every value is finite";
  cards.push(card("NaN and Inf", nan ? count(nan) : "none", told, { class: nan || faults ? "card bad" : "card" }));
  return cards;
}

/** Bytes by format: a bar with its legend. */
function formatsCard(model) {
  const groups = [...grouped(model.rows, (row) => row.format)]
    .map(([format, rows]) => [format, rows.reduce((sum, row) => sum + row.bytes, 0)])
    .sort(([, one], [, other]) => other - one);
  const all = groups.reduce((sum, [, bytes]) => sum + bytes, 0);
  const bar = el("div", { class: "bar", "aria-hidden": "true" });
  const legend = el("ul", { class: "legend" });
  groups.forEach(([format, bytes], place) => {
    const part = el("span", { class: `part tint-${place % 5}` });
    part.style.flexGrow = String(Math.max(bytes / all, 0.004));
    bar.append(part);
    legend.append(el("li", {}, el("i", { class: `tint-${place % 5}` }), `${format} `, el("b", {}, share(bytes, all))));
  });
  return el("div", { class: "card formats" }, el("p", { class: "label" }, "Bytes by format"), bar, legend);
}

/** One row a format and rule; the best of each format is marked, the chosen one is checked. */
function showConversions(found, chosen, choose) {
  const offered = found
    .map((measure, place) => ({ ...measure, place }))
    .filter((measure) => measure.format && measure.total);
  byId("conversions").hidden = !offered.length;
  if (!offered.length) return;
  const best = new Map();
  for (const { format, total } of offered) best.set(format, Math.max(best.get(format) ?? -Infinity, sqnr(total)));
  const widest = Math.max(...offered.map(({ total }) => finite(sqnr(total))), 1);
  const titles = ["Format", "Scale rule", "SQNR", "", "MSE", "Largest error", "Cosine"];
  const named = titles.map((title) => (title ? el("th", { scope: "col" }, title) : el("td", { class: "meter-cell" })));
  const head = el("tr", {}, el("td"), ...named);
  const body = offered.map(({ format, rule, total, place }) => {
    const option = el("input", {
      type: "radio",
      name: "conversion",
      "aria-label": `${format}, ${rule}`,
      checked: place === chosen,
    });
    option.addEventListener("change", () => choose(place));
    const bar = el("span", { class: "meter" }, el("span"));
    bar.firstChild.style.width = `${(100 * finite(sqnr(total))) / widest}%`;
    const top = sqnr(total) === best.get(format);
    const row = el(
      "tr",
      { class: place === chosen ? "chosen" : null },
      el("td", {}, option),
      el("td", {}, format),
      el("td", {}, rule, top ? el("span", { class: "mark" }, "least error") : null),
      el("td", { class: "num" }, decibels(total, " dB")),
      el("td", { class: "meter-cell" }, bar),
      el("td", { class: "num" }, number(mse(total))),
      el("td", { class: "num" }, number(total.maxAbs)),
      el("td", { class: "num" }, cosine(total).toFixed(6)),
    );
    row.addEventListener("click", (event) => event.target !== option && choose(place));
    return row;
  });
  const table = byId("conversions").querySelector("table");
  const focused = table.contains(document.activeElement);
  table.replaceChildren(el("thead", {}, head), el("tbody", {}, ...body));
  if (focused) table.querySelector("input:checked")?.focus();
}

const finite = (value) => (Number.isFinite(value) ? Math.max(value, 0) : 0);
