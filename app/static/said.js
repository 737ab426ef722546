// What became of a file that was dropped on the page.
drawWith((root, view) => {
  root.replaceChildren(view.said ? notice(view.said, "quiet") : "");
});
