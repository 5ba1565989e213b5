// Wide formulas and, on a phone, wide figures and tables scroll inside themselves: make them reachable by keyboard, as the theme
// does for wide code.
const wide = 'mjx-container[display="true"], figure.lens [role="img"], .pst-scrollable-table-container';
const makeReachable = () =>
  document.querySelectorAll(wide).forEach((element) => {
    if (element.scrollWidth > element.clientWidth) element.tabIndex = 0;
    else element.removeAttribute("tabindex");
  });
window.addEventListener("load", () => Promise.resolve(window.MathJax?.startup?.promise).then(makeReachable));
window.addEventListener("resize", makeReachable);
