// The figures that the page was made with, read back into one object a tensor (payload.py wrote them).

/** The text in script element `id`: base64 of gzip of UTF-8. */
async function unpacked(id) {
  const letters = atob(byId(id).textContent);
  const bytes = new Uint8Array(letters.length);
  for (let place = 0; place < letters.length; place += 1) bytes[place] = letters.charCodeAt(place);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

async function readModel() {
  const told = JSON.parse(await unpacked("figures"));
  const scales = told.scales.map(Number);
  const rows = told.tensors.map((columns, index) => readRow(told, scales, columns, index));
  return { ...told, rows, conversions: told.conversions.map(([format, rule]) => ({ format, rule })) };
}

function readRow(told, scales, columns, index) {
  const [name, format, shape, bytes, bits, role, file, layer, kind, values, error, estimates] = columns;
  return {
    index,
    name,
    format: told.formats[format],
    shape: shape.length ? shape.join(" × ") : "scalar",
    elements: shape.reduce((product, length) => product * length, 1),
    bytes,
    bits,
    role: told.roles[role],
    file: told.files[file],
    layer,
    kind: told.kinds[kind],
    values: values && readValues(values, scales),
    error: error && readError(error),
    estimates: new Map(estimates.map(([place, ...figures]) => [place, readError(figures)])),
  };
}

function readError([values, differ, leftOut, ...sums]) {
  const [signal, noise, dot, power, maxAbs, maxRel] = sums.map(Number);
  return { values, differ, leftOut, signal, noise, dot, power, maxAbs, maxRel };
}

function readValues(columns, known) {
  const [ends, counts, [codes, spread]] = [columns.slice(0, 3), columns.slice(3, 12), columns.slice(12)];
  const [smallest, largest, tensorScale] = ends.map((value) => (value === null ? null : Number(value)));
  const [zeros, nan, blocks, zeroBlocks, saturated, unused, nanScales, negativeScales, deadBlocks] = counts;
  const scales = [];
  for (let place = 0; place < spread.length; place += 2) scales.push([known[spread[place]], spread[place + 1]]);
  const inBlocks = { blocks, zeroBlocks, saturated, unused, nanScales, negativeScales, deadBlocks };
  return { smallest, largest, tensorScale, zeros, nan, codes, scales, ...inBlocks };
}

/** 'exponent' where scales are powers of two, 'e4m3' where they are numbers of that format, else 'value'. */
function scaleKind(format) {
  if (format.startsWith("mxfp4")) return "exponent";
  return format.startsWith("nvfp4") ? "e4m3" : "value";
}

/** Scales from the least to the largest; steps that no block has stand too, so that distances are seen. */
function scaleBins(format, scales) {
  if (!scales.length) return [];
  const kind = scaleKind(format);
  if (kind === "exponent") return stepped(scales, (step) => `2^${step}`.replace("-", MINUS));
  const coded = scales.map(([value, blocks]) => [E4M3_CODE.get(value), blocks]);
  if (kind === "e4m3" && coded.every(([code]) => code !== undefined)) {
    return stepped(
      coded,
      (code) => number(E4M3[code], 4),
      (code) => E4M3[code],
    );
  }
  return scales.map(([value, blocks]) => ({ label: number(value, 4), value, blocks }));
}

const MOST_EMPTY = 8; // steps in a row; the blocks of zeros lie far below all others, and would squeeze those together

function stepped(pairs, label, valueOf = (step) => step) {
  const bins = [];
  let last = null;
  for (const [step, blocks] of pairs.toSorted(([one], [other]) => one - other)) {
    const empty = last === null ? 0 : step - last - 1;
    if (empty > MOST_EMPTY) bins.push({ label: "…", value: null, blocks: 0 });
    else
      for (let between = last + 1; between < last + 1 + empty; between += 1)
        bins.push({ label: label(between), value: valueOf(between), blocks: 0 });
    bins.push({ label: label(step), value: valueOf(step), blocks });
    last = step;
  }
  return bins;
}

/** Counts of all tensors of one format, added up. */
function summed(rows) {
  const codes = new Array(16).fill(0);
  const scales = new Map();
  for (const { values } of rows) {
    values.codes.forEach((occurs, code) => (codes[code] += occurs));
    for (const [value, blocks] of values.scales) scales.set(value, (scales.get(value) ?? 0) + blocks);
  }
  return { codes, scales: [...scales].sort(([one], [other]) => one - other) };
}
