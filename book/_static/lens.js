// Wide formulas scroll inside themselves: make them reachable by keyboard, as the theme does for wide code.
const reachFormulas = () =>
  document.querySelectorAll('mjx-container[display="true"]').forEach((formula) => {
    if (formula.scrollWidth > formula.clientWidth) formula.tabIndex = 0;
    else formula.removeAttribute("tabindex");
  });
window.addEventListener("load", () => window.MathJax?.startup?.promise.then(reachFormulas));
window.addEventListener("resize", reachFormulas);
