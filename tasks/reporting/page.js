// The table of facts: search, filter, sort, expand. The address keeps what is shown, as in
// #q=Rome&show=hurts&sort=-6&fact=12 (column 6, descending; fact 12 open).
const table = document.getElementById("facts");
const heads = [...table.tHead.rows[0].cells];
const form = document.querySelector(".tools");
const search = document.getElementById("search");
const facts = [...table.tBodies].map((body, index) => ({
  body,
  index,
  text: body.textContent.toLowerCase(),
  cells: [...body.rows[0].cells].map((cell) => cell.dataset.v ?? cell.textContent.trim()),
}));
const state = new URLSearchParams();
const is = (fact, show) => !show || fact.body.classList.contains(show);

function showFacts() {
  const words = search.value.toLowerCase().split(/\s+/);
  const show = state.get("show") ?? "";
  let shown = 0;
  for (const fact of facts) {
    fact.body.hidden = !is(fact, show) || !words.every((word) => fact.text.includes(word));
    shown += !fact.body.hidden;
  }
  document.getElementById("shown").textContent = `${shown} of ${facts.length} facts`;
  document.getElementById("none").hidden = shown > 0;
  for (const button of form.querySelectorAll("button")) {
    button.ariaPressed = button.dataset.show === show;
  }
}

function compare(a, b) {
  if (a === "" || b === "") return (a === "") - (b === "");
  return a - b || (isNaN(a - b) ? a.localeCompare(b) : 0);
}

function sortFacts() {
  const sort = parseInt(state.get("sort")) || 0;
  const column = Math.max(Math.abs(sort), 1) - 1;
  const sign = sort < 0 ? -1 : 1;
  facts.sort((a, b) => sign * compare(a.cells[column], b.cells[column]) || a.index - b.index);
  table.append(...facts.map((fact) => fact.body));
  heads.forEach((head, index) => {
    head.ariaSort = sort && index === column ? (sign > 0 ? "ascending" : "descending") : null;
  });
}

function expand(body, open) {
  body.querySelector("button").ariaExpanded = open;
  body.rows[1].hidden = !open;
}

function change(name, value) {
  if (value) state.set(name, value);
  else state.delete(name);
  sortFacts();
  showFacts();
  history.replaceState(null, "", `#${state}`);
}

function readAddress() {
  const address = new URLSearchParams(location.hash.slice(1));
  const body = document.getElementById(`fact-${address.get("fact")}`);
  for (const name of ["q", "show", "sort"]) {
    if (address.has(name)) state.set(name, address.get(name));
    else if (body) state.delete(name); // a link to a fact must find it
  }
  search.value = state.get("q") ?? "";
  sortFacts();
  showFacts();
  if (body) {
    expand(body, true);
    body.scrollIntoView({ block: "center" });
    body.querySelector("button").focus({ preventScroll: true });
  }
}

heads.forEach((head, index) => {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const column = `${index + 1}`;
    change("sort", state.get("sort") === column ? `-${column}` : column);
  });
});
for (const button of form.querySelectorAll("button")) {
  const count = facts.filter((fact) => is(fact, button.dataset.show)).length;
  button.append(` ${count}`);
  button.hidden = !count;
  button.addEventListener("click", () => change("show", button.dataset.show));
}
table.addEventListener("click", (event) => {
  const row = event.target.closest("tbody[id] > tr:first-child");
  if (row && !String(getSelection())) expand(row.parentElement, row.nextElementSibling.hidden);
});
search.addEventListener("input", () => change("q", search.value.trim()));
form.addEventListener("submit", (event) => event.preventDefault());
addEventListener("hashchange", readAddress);
form.hidden = false;
readAddress();
