"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // A frame without storage (an artefact viewer) keeps the choice for this page alone.
  const kept = {
    get() { try { return localStorage.getItem("faculty-theme"); } catch { return null; } },
    set(value) { try { localStorage.setItem("faculty-theme", value); } catch { /* for this page alone */ } },
  };
  const show = (theme) => {
    if (theme === "light" || theme === "dark") root.dataset.theme = theme; else delete root.dataset.theme;
    for (const button of all(".themes button")) {
      button.setAttribute("aria-pressed", String(button.value === (root.dataset.theme || "auto")));
    }
  };
  show(new URLSearchParams(location.search).get("theme") || kept.get() || "auto");
  for (const button of all(".themes button")) {
    button.addEventListener("click", () => { show(button.value); kept.set(button.value); });
  }

  // Tables: the first rows, those that a search finds, or all; sorted by any column.
  const fold = (text) => text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();
  for (const table of all("table[data-top]")) {
    const top = Number(table.dataset.top), body = table.tBodies[0];
    const tools = document.querySelector(`.tools[data-for="${table.id}"]`);
    const input = tools?.querySelector("input"), output = tools?.querySelector("output"), more = tools?.querySelector("button");
    const names = new Map(all("tr", body).map((row) => [row, fold(row.dataset.search || row.textContent)]));
    let open = false;
    const fill = () => {
      const asked = fold(input?.value || "").trim();
      let found = 0, shown = 0;
      for (const row of body.rows) {
        const hit = names.get(row).includes(asked);
        found += hit;
        row.hidden = !(hit && (open || found <= top || (row.classList.contains("own") && !asked)));
        shown += !row.hidden;
      }
      if (output) output.textContent = `${shown.toLocaleString("en")} of ${names.size.toLocaleString("en")}`;
      if (more) {
        more.hidden = found <= top;
        more.textContent = open ? "show fewer" : "show all";
        more.setAttribute("aria-expanded", String(open));
      }
    };
    input?.addEventListener("input", fill);
    more?.addEventListener("click", () => { open = !open; fill(); });
    table.addEventListener("sorted", fill);
    fill();
  }
  for (const button of all("th button")) {
    const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
    button.addEventListener("click", () => {
      const place = head.cellIndex, numeric = head.classList.contains("n") || head.dataset.kind === "n";
      const down = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "ascending" : numeric;
      for (const other of all("th[aria-sort]", table)) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[place].dataset.value ?? row.cells[place].textContent.trim();
      const rows = [...body.rows].map((row) => [row, numeric ? parseFloat(value(row)) : value(row)]);
      rows.sort(([, a], [, b]) => {
        if (numeric) {
          if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);  // what is not known comes last
          return down ? b - a : a - b;
        }
        return down ? b.localeCompare(a) : a.localeCompare(b);
      });
      body.append(...rows.map(([row]) => row));
      table.dispatchEvent(new Event("sorted"));
    });
  }

  // The table of contents follows.
  const links = new Map(all(".contents a[href^='#']").map((link) => [link.hash.slice(1), link]));
  if ("IntersectionObserver" in window) {
    const seen = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        for (const link of links.values()) link.removeAttribute("aria-current");
        links.get(entry.target.id)?.setAttribute("aria-current", "true");
      }
    }, { rootMargin: "-10% 0px -75% 0px" });
    for (const id of links.keys()) { const target = document.getElementById(id); if (target) seen.observe(target); }
  }
})();
