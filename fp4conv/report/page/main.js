// Puts the page together: the table first, then the plots, which need the library.

async function start() {
  const model = await readModel();
  const found = measures(model);
  let chosen = firstMeasure(found);
  showHead(model);
  showCards(model, found);
  const table = startTable(model, found[chosen]);
  const drawAll = async () => {
    if (found.length) await drawErrors(model, found[chosen], table.only);
    await drawSpread(model);
  };
  const choose = (place) => {
    chosen = place;
    byId("measure").value = `${place}`;
    showConversions(found, chosen, choose);
    sayMeasure(found[chosen]);
    table.measureBy(found[chosen]);
    drawErrors(model, found[chosen], table.only).catch(failed);
  };
  showConversions(found, chosen, choose);
  offerMeasures(found, chosen, choose);
  const showDetails = startDetails(model, found, table.neighbour);
  startTheme(() => {
    drawAll().catch(failed);
    showDetails();
  });
  startPrinting(() => drawAll().catch(failed));
  document.documentElement.dataset.ready = "table";
  await new Promise((painted) => requestAnimationFrame(() => setTimeout(painted)));
  await drawAll();
  document.documentElement.dataset.ready = "all";
}

function offerMeasures(found, chosen, choose) {
  byId("error").hidden = !found.length;
  if (!found.length) return;
  const select = byId("measure");
  select.append(
    ...found.map((measure, place) => el("option", { value: place, selected: place === chosen }, measure.name)),
  );
  select.addEventListener("change", () => choose(Number(select.value)));
  select.closest("label").hidden = found.length < 2;
  sayMeasure(found[chosen]);
}

function sayMeasure({ total, name }) {
  const lead = byId("error-lead");
  if (total === null) {
    lead.textContent = `No tensor has an error of ${name}.`;
  } else if (!total.differ && !total.noise) {
    lead.textContent = `Of ${name}: every value is equal.`;
  } else {
    lead.textContent = `Of ${name}: ${decibels(total, " dB")} over ${short(total.values)} values. Each 6 dB more halve the error. Tensors that are equal are not counted.`;
  }
}

function failed(error) {
  const place = byId("broken");
  place.hidden = false;
  place.textContent = `This page could not be drawn: ${error}. It needs a browser of 2023 or later.`;
  console.error(error);
}

start().catch(failed);
