// Dark mode of the charts: Bokeh draws on canvases, so their colours are replaced before it draws.
"use strict";
const themed = (() => {
  const scheme = window.matchMedia("(prefers-color-scheme: dark)");
  const colours = JSON.parse(document.getElementById("dark-colours").textContent);
  scheme.addEventListener("change", () => location.reload());
  return (text) => {
    if (!scheme.matches) return text;
    return text.replace(/"#[0-9a-fA-F]{6}"/g, (found) => {
      const dark = colours[found.slice(1, -1)];
      return dark ? `"${dark}"` : found;
    });
  };
})();
