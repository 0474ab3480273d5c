// Sorting, filters, stepping through cases and the contents at the side; the page reads the same without them.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  if (body.rows.length < 2) continue;
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const ascending = heading.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
      const compare = (a, b) => {
        if (a === "" || b === "") return (a === "") - (b === ""); // what is undefined stays last
        const difference = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
        return ascending ? difference : -difference;
      };
      body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
    });
  });
  if (!table.classList.contains("filtered") || body.rows.length < 10) continue;
  const filter = document.createElement("input");
  filter.type = "search";
  filter.placeholder = "Filter by case, site or role";
  filter.setAttribute("aria-label", filter.placeholder);
  filter.addEventListener("input", () => {
    const wanted = filter.value.toLowerCase();
    for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
  table.parentElement.before(filter);
}

// A list of cases: one row is chosen, and beside the list stands what the page knows of it.
class Cases {
  constructor(section) {
    this.section = section;
    this.list = section.querySelector(".list");
    this.body = this.list.querySelector("tbody");
    this.filters = section.querySelector(".filters");
    const articles = section.querySelectorAll(".one-case");
    this.articles = new Map([...this.body.rows].map((row, index) => [row, articles[index]]));
    this.list.tabIndex = -1;
    this.filters.hidden = false;
    this.filters.addEventListener("input", () => this.filter());
    this.filters.addEventListener("submit", (event) => event.preventDefault());
    this.body.addEventListener("click", (event) => this.choose(event.target.closest("tr"), true));
    this.filter();
  }
  get shown() {
    return [...this.body.rows].filter((row) => !row.hidden);
  }
  get article() {
    return this.articles.get(this.current);
  }
  filter() {
    const wanted = (name) => this.filters.elements[name]?.value ?? "";
    const text = wanted("text").trim().toLowerCase();
    for (const row of this.body.rows) {
      row.hidden =
        !row.dataset.case.toLowerCase().includes(text) ||
        (wanted("site") !== "" && row.dataset.site !== wanted("site")) ||
        (wanted("verdict") !== "" && row.dataset.verdict !== wanted("verdict"));
    }
    const { shown } = this;
    this.filters.querySelector("output").textContent = `${shown.length} of ${this.body.rows.length} cases`;
    if (!shown.includes(this.current)) this.choose(shown[0]);
  }
  choose(row, focus = false) {
    if (this.current) {
      this.current.removeAttribute("aria-current");
      this.current.removeAttribute("tabindex");
      this.article?.classList.remove("current");
    }
    this.current = row;
    if (!row) return;
    row.setAttribute("aria-current", "true");
    row.tabIndex = 0;
    this.article?.classList.add("current");
    if (!focus) return;
    row.focus({ preventScroll: true });
    const [head, place, list] = [this.list.querySelector("thead"), row, this.list].map((e) => e.getBoundingClientRect());
    if (place.top < list.top + head.height) this.list.scrollTop -= list.top + head.height - place.top;
    else if (place.bottom > list.bottom) this.list.scrollTop += place.bottom - list.bottom;
    const { top, bottom } = this.section.querySelector(".browser").getBoundingClientRect();
    if (top < 0 || bottom > innerHeight) row.closest(".browser").scrollIntoView({ block: top < 0 ? "start" : "nearest" });
    Cases.last = this;
  }
  step(by) {
    const { shown } = this;
    const place = shown.indexOf(this.current);
    const next = Cases.last === this ? shown[Math.min(Math.max(place + by, 0), shown.length - 1)] : this.current;
    if (next) this.choose(next, true);
    return next;
  }
}

const lists = [...document.querySelectorAll("section.cases")].map((section) => new Cases(section));
const listAt = (element) => lists.find((cases) => cases.section.contains(element)) ?? Cases.last ?? lists[0];

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !lists.length) return;
  const { target } = event;
  if (document.querySelector("dialog[open]") || target.matches("input, select, textarea")) return;
  const cases = listAt(target);
  const inList = cases.list.contains(target);
  const does = {
    j: () => cases.step(1),
    k: () => cases.step(-1),
    ArrowDown: inList && (() => cases.step(1)),
    ArrowUp: inList && (() => cases.step(-1)),
    "/": () => cases.filters.elements.text.focus(),
    "?": () => document.getElementById("help").showModal(),
    v: () => cases.article?.querySelector(".open-viewer")?.click(),
  }[event.key];
  if (!does) return;
  event.preventDefault();
  does();
});

// The section that is read is marked in the contents.
const links = new Map([...document.querySelectorAll(".contents a")].map((link) => [link.hash.slice(1), link]));
const headings = [...links.keys()].map((id) => document.getElementById(id));
const mark = () => {
  const passed = headings.filter((heading) => heading.getBoundingClientRect().top < innerHeight / 3);
  const here = links.get((passed.at(-1) ?? headings[0])?.id);
  for (const link of links.values()) {
    if (link === here) link.setAttribute("aria-current", "location");
    else link.removeAttribute("aria-current");
  }
};
let marking = 0;
addEventListener("scroll", () => {
  cancelAnimationFrame(marking);
  marking = requestAnimationFrame(mark);
}, { passive: true });
mark();

// A printed page shows what is folded on the screen.
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("main details")) part.open = true;
});
