// Search shows an extract of each page, for which it fetches that page. A browser forbids that for files, and says so in red; there it is left out.
if (location.protocol === "file:") {
  DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
}

// Sphinx looks for the anchor of a Python name as it stands, and a dot in it would begin a class.
document.addEventListener("DOMContentLoaded", () => {
  if (typeof Search === "undefined") return;
  const htmlToText = Search.htmlToText;
  Search.htmlToText = (html, anchor) => htmlToText(html, anchor && "#" + CSS.escape(anchor.slice(1)));
});
