// Plots, drawn by plotly.js, which is unpacked after the table is there: it is most of the page's weight.

let plotting = null;

/** Unpack and run the library, once. Its digest is in the page's policy, so nothing else could run in its place. */
function plotly() {
  plotting ??= unpacked("library").then((text) => {
    const script = document.createElement("script");
    script.textContent = text;
    document.head.append(script);
    return window.Plotly;
  });
  return plotting;
}

const CONFIG = { displayModeBar: false, responsive: true, showTips: false };

/** plotly reads a few tags, entities and $formulas$ in labels; names of strangers shall stay as they are written, and short. */
function label(text, most = 36) {
  const cut = text.length > most ? `${text.slice(0, most - 1)}…` : text;
  return cut.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll("$", "&#36;");
}

const titled = (text) => ({ text, standoff: 6, font: { size: 12 } });

function frame(changes = {}) {
  const colours = palette();
  const axis = {
    gridcolor: colours.line,
    linecolor: colours.line,
    zeroline: false,
    automargin: true,
    fixedrange: true,
    tickfont: { size: 11.5 },
  };
  return {
    font: { family: colours.font, size: 12, color: colours.muted },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 8, r: 12, t: 8, b: 8 },
    showlegend: false,
    hoverlabel: {
      bgcolor: colours.surface,
      bordercolor: colours.line,
      font: { family: colours.font, size: 12, color: colours.text },
      align: "left",
    },
    ...changes,
    xaxis: { ...axis, ...changes.xaxis },
    yaxis: { ...axis, ...changes.yaxis },
  };
}

/** Draw into `figure`, and say in words what it shows. `click(point)` where its marks lead somewhere. */
async function draw(figure, data, layout, words, click = null) {
  const library = await plotly();
  const place = figure.querySelector(".plot");
  place.setAttribute("role", "img");
  place.setAttribute("aria-label", words);
  const paper = figure.classList.contains("wide") ? 920 : 440; // of A4 and of letter, lying
  const sized = onPaper() ? { ...layout, width: paper } : layout;
  await library.react(place, data, sized, CONFIG);
  place.removeAllListeners("plotly_click");
  if (click) place.on("plotly_click", (event) => click(event.points[0]));
  figure.classList.toggle("leads", click !== null);
}

/** Of rows with a measured error: all together, and the tensors that lost most and least. Exact ones have no dB. */
function summaries(rows, of, key) {
  const groups = grouped(
    rows.filter((row) => of(row) !== null),
    key,
  );
  return [...groups].map(([name, members]) => {
    const each = members.map((row) => sqnr(of(row))).filter(Number.isFinite);
    return {
      name,
      count: members.length,
      error: together(members.map(of)),
      least: each.reduce((one, other) => Math.min(one, other), Infinity),
      most: each.reduce((one, other) => Math.max(one, other), -Infinity),
    };
  });
}

const told = (entry) =>
  decibels(entry.error, " dB") +
  (entry.count > 1
    ? `<br>${count(entry.count)} tensors, ${entry.least.toFixed(2)} to ${entry.most.toFixed(2)} dB`
    : "");

/** Those with a figure that a plot can have, and that figure. */
const drawable = (entries) =>
  entries.map((entry) => ({ ...entry, total: sqnr(entry.error) })).filter((entry) => Number.isFinite(entry.total));

async function drawErrors(model, measure, pick) {
  const rows = model.rows;
  const layers = drawable(
    summaries(
      rows.filter((row) => row.layer !== null),
      measure.counted,
      (row) => row.layer,
    ),
  ).sort((one, other) => one.name - other.name);
  const kinds = drawable(summaries(rows, measure.counted, (row) => row.kind)).sort(
    (one, other) => other.total - one.total,
  );
  byId("by-layer").hidden = layers.length < 2;
  byId("by-kind").hidden = !kinds.length;
  byId("by-both").hidden = layers.length < 2 || kinds.length < 2;
  if (layers.length > 1) await drawLayers(layers, pick);
  if (kinds.length) await drawKinds(kinds, pick);
  if (!byId("by-both").hidden) await drawBoth(rows, measure, layers, kinds, pick);
}

function drawLayers(layers, pick) {
  const colours = palette();
  const x = layers.map((entry) => entry.name);
  const band = {
    x: [...x, ...x.toReversed()],
    y: [...layers.map((entry) => entry.most), ...layers.toReversed().map((entry) => entry.least)],
    fill: "toself",
    fillcolor: colours.soft,
    line: { width: 0 },
    mode: "lines",
    hoverinfo: "skip",
  };
  const line = {
    x,
    y: layers.map((entry) => entry.total),
    mode: layers.length > 60 ? "lines" : "lines+markers",
    line: { color: colours.accent, width: 2 },
    marker: { size: 6 },
    text: layers.map((entry) => `layer ${entry.name}: ${told(entry)}`),
    hovertemplate: "%{text}<extra></extra>",
  };
  const layout = frame({
    xaxis: { title: titled("layer"), showgrid: false, ...wholeTicks(x) },
    yaxis: { title: titled("SQNR, dB") },
  });
  const worst = layers.reduce((one, other) => (other.total < one.total ? other : one));
  return draw(
    byId("by-layer"),
    [band, line],
    layout,
    `SQNR by layer; lowest in layer ${worst.name}, ${worst.total.toFixed(2)} dB`,
    (point) => pick({ layer: point.x }),
  );
}

const wholeTicks = (numbers) => ({
  tickformat: "d",
  dtick: Math.max(1, Math.ceil((numbers.at(-1) - numbers[0]) / 12)),
  range: [numbers[0] - 0.5, numbers.at(-1) + 0.5],
});

/** A dot a kind for all of its tensors, on a line from the worst to the best of them. */
function drawKinds(kinds, pick) {
  const colours = palette();
  const y = kinds.map((_, place) => place);
  const ends = kinds.reduce(
    ([least, most], entry) => [Math.min(least, entry.least), Math.max(most, entry.most)],
    [Infinity, -Infinity],
  );
  const room = Math.max(0.05 * (ends[1] - ends[0]), 0.1);
  const ranges = {
    x: kinds.flatMap((entry) => [entry.least, entry.most, null]),
    y: y.flatMap((place) => [place, place, null]),
    mode: "lines",
    line: { color: colours.soft, width: 8 },
    hoverinfo: "skip",
  };
  const dots = {
    x: kinds.map((entry) => entry.total),
    y,
    mode: "markers",
    marker: { color: colours.accent, size: 9 },
    text: kinds.map((entry) => `${label(entry.name)}: ${told(entry)}`),
    hovertemplate: "%{text}<extra></extra>",
  };
  const layout = frame({
    height: Math.max(260, 60 + 24 * kinds.length),
    hovermode: "closest",
    xaxis: { title: titled("SQNR, dB"), range: [ends[0] - room, ends[1] + room] },
    yaxis: { tickvals: y, ticktext: kinds.map((entry) => label(entry.name, 28)), range: [-0.6, kinds.length - 0.4] },
  });
  const worst = kinds.at(-1);
  return draw(
    byId("by-kind"),
    [ranges, dots],
    layout,
    `SQNR by kind of module; lowest in ${worst.name}, ${worst.total.toFixed(2)} dB`,
    (point) => pick({ kind: kinds[point.y].name }),
  );
}

function drawBoth(rows, measure, layers, kinds, pick) {
  const colours = palette();
  const inLayers = kinds.filter(({ name }) =>
    rows.some((row) => row.kind === name && row.layer !== null && measure.counted(row) !== null),
  );
  const cells = new Map(
    drawable(
      summaries(
        rows.filter((row) => row.layer !== null),
        measure.counted,
        (row) => `${row.layer} ${row.kind}`,
      ),
    ).map((entry) => [entry.name, entry]),
  );
  const at = (kind, layer) => cells.get(`${layer.name} ${kind.name}`);
  const z = inLayers.map((kind) => layers.map((layer) => at(kind, layer)?.total ?? null));
  const text = inLayers.map((kind) =>
    layers.map((layer) =>
      at(kind, layer) ? `layer ${layer.name}, ${label(kind.name)}: ${told(at(kind, layer))}` : "",
    ),
  );
  const heat = {
    type: "heatmap",
    x: layers.map((layer) => layer.name),
    y: inLayers.map((_, place) => place),
    z,
    text,
    hovertemplate: "%{text}<extra></extra>",
    xgap: layers.length > 80 ? 0 : 2,
    ygap: 2,
    colorscale: colours.heat.map((colour, place) => [place / 2, colour]),
    colorbar: { thickness: 10, outlinewidth: 0, title: { text: "dB", side: "top" }, len: 1, ypad: 4, nticks: 4 },
    hoverongaps: false,
  };
  const layout = frame({
    height: Math.max(180, 70 + 24 * inLayers.length),
    xaxis: { title: titled("layer"), showgrid: false, ...wholeTicks(heat.x) },
    yaxis: { tickvals: heat.y, ticktext: inLayers.map((kind) => label(kind.name, 28)), showgrid: false },
  });
  const words = `SQNR of each layer and kind of module, ${inLayers.length} kinds in ${layers.length} layers; the table below has every figure`;
  return draw(byId("by-both"), [heat], layout, words, (point) =>
    pick({ layer: point.x, kind: inLayers[point.y].name }),
  );
}

function newFigure(title, wide = false) {
  return el("figure", { class: wide ? "wide" : null }, el("figcaption", {}, title), el("div", { class: "plot" }));
}

function drawCodes(figure, codes) {
  const colours = palette();
  const all = codes.reduce((sum, occurs) => sum + occurs, 0);
  const counts = CODE_ORDER.map((code) => codes[code]);
  const names = CODE_ORDER.map(codeName);
  const bars = {
    type: "bar",
    x: names.map((_, place) => place),
    y: counts.map((occurs) => (100 * occurs) / (all || 1)),
    marker: { color: colours.accent },
    text: counts.map((occurs, place) => `${names[place]}: ${count(occurs)} values, ${share(occurs, all)}`),
    textposition: "none",
    hovertemplate: "%{text}<extra></extra>",
  };
  const layout = frame({
    height: 240,
    bargap: 0.2,
    xaxis: {
      tickvals: bars.x,
      ticktext: names,
      tickangle: 0,
      showgrid: false,
      title: titled("value of the code"),
    },
    yaxis: { ticksuffix: " %" },
  });
  const most = counts.indexOf(Math.max(...counts));
  return draw(
    figure,
    [bars],
    layout,
    `How often each of the 16 codes occurs; ${names[most]} most often, ${share(counts[most], all)}`,
  );
}

/** The bins that are named: the first, breaks where there is room, and powers of two or every so many steps between. */
function scaleTicks(bins, coded) {
  const fine = bins.length > 24;
  const breaks = bins.map((bin, place) => (bin.value === null ? place : -1)).filter((place) => place >= 0);
  const free = (place) => place !== 0 && [0, ...breaks].every((other) => Math.abs(other - place) >= bins.length / 14);
  const even = (place) =>
    coded && fine ? Math.log2(bins[place].value) % 2 === 0 : place % Math.ceil(bins.length / 9) === 0;
  return bins
    .map((_, place) => place)
    .filter((place) => place === 0 || (breaks.includes(place) ? !fine : free(place) && even(place)));
}

function drawScales(figure, format, scales) {
  const bins = scaleBins(format, scales);
  const colours = palette();
  const all = bins.reduce((sum, bin) => sum + bin.blocks, 0);
  const coded = scaleKind(format) === "e4m3";
  const ticks = scaleTicks(bins, coded);
  const bars = {
    type: "bar",
    x: bins.map((_, place) => place),
    y: bins.map((bin) => (100 * bin.blocks) / (all || 1)),
    marker: { color: colours.accent },
    text: bins.map((bin) => `${bin.label}: ${count(bin.blocks)} blocks, ${share(bin.blocks, all)}`),
    textposition: "none",
    hovertemplate: "%{text}<extra></extra>",
  };
  const layout = frame({
    height: 240,
    bargap: bins.length > 40 ? 0 : 0.2,
    xaxis: {
      tickvals: ticks,
      ticktext: ticks.map((place) => bins[place].label.replace(/\^(.*)/, "<sup>$1</sup>")),
      tickangle: 0,
      showgrid: false,
      title: titled(coded ? "block scale, before the tensor scale" : "block scale"),
    },
    yaxis: { ticksuffix: " %" },
  });
  const ends = bins.length ? `from ${bins[0].label} to ${bins.at(-1).label}` : "none";
  return draw(figure, [bars], layout, `Block scales of ${count(all)} blocks, ${ends}`);
}

/** Codes and scales of each block format; of a model without blocks, where its bytes are. */
async function drawSpread(model) {
  const blocked = model.rows.filter((row) => row.values !== null && row.values.codes.length);
  const place = byId("spread").querySelector(".charts");
  place.replaceChildren();
  if (!blocked.length) {
    byId("spread-title").textContent = "Size";
    const figure = newFigure("Bytes by kind of module", true);
    place.append(figure);
    return drawBytes(figure, model.rows);
  }
  byId("spread-lead").textContent = "Over all quantised tensors together; a tensor's own are in its details.";
  for (const [format, rows] of grouped(blocked, (row) => row.format)) {
    const { codes, scales } = summed(rows);
    const [one, other] = [newFigure(`Block scales, ${format}`), newFigure(`Codes, ${format}`)];
    place.append(one, other);
    await drawScales(one, format, scales);
    await drawCodes(other, codes);
  }
}

function drawBytes(figure, rows) {
  const colours = palette();
  const kinds = [...grouped(rows, (row) => row.kind || "other")].map(([kind, members]) => ({
    kind,
    members: members.length,
    bytes: members.reduce((sum, row) => sum + row.bytes, 0),
  }));
  const shown = kinds
    .sort((one, other) => other.bytes - one.bytes)
    .slice(0, 16)
    .toReversed();
  const bars = {
    type: "bar",
    orientation: "h",
    y: shown.map((_, place) => place),
    x: shown.map((entry) => entry.bytes),
    marker: { color: colours.accent },
    text: shown.map((entry) => `${label(entry.kind)}: ${size(entry.bytes)} in ${count(entry.members)} tensors`),
    textposition: "none",
    hovertemplate: "%{text}<extra></extra>",
  };
  const layout = frame({
    height: 70 + 22 * shown.length,
    bargap: 0.35,
    xaxis: { tickformat: ".3~s", ticksuffix: "B" },
    yaxis: { tickvals: bars.y, ticktext: shown.map((entry) => label(entry.kind, 28)), showgrid: false },
  });
  return draw(figure, [bars], layout, `Bytes by kind of module; most in ${shown.at(-1)?.kind ?? "none"}`);
}
