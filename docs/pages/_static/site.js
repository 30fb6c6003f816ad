// Search shows an extract of each page, for which it fetches that page. A browser forbids that for files, and says so in red; there it is left out.
if (location.protocol === "file:") {
  DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
}
