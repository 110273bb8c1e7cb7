// Elements, made without markup: whatever a name holds becomes text.

const byId = (id) => document.getElementById(id);

/** A new element; `children` are elements or text. Attributes that are null or false are left out. */
function el(tag, attributes = {}, ...children) {
  return fitted(document.createElement(tag), attributes, children);
}

/** The same for drawings. */
function svg(tag, attributes = {}, ...children) {
  return fitted(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fitted(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === false) continue;
    node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** Bars on one baseline, as wide as `width` units, in a table's cell; `label` says it to those who do not see it. */
function sparkline(counts, width, height, label) {
  const most = Math.max(...counts, 1);
  const step = width / counts.length;
  let path = "";
  counts.forEach((count, place) => {
    if (!count) return;
    const tall = Math.max(1, (count / most) * height);
    path += `M${(place * step).toFixed(2)} ${height}v${(-tall).toFixed(2)}h${(step * 0.82).toFixed(2)}v${tall.toFixed(2)}z`;
  });
  const box = { class: "spark", viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label };
  return svg("svg", box, svg("path", { d: path }));
}
