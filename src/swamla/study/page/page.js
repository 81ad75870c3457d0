"use strict";
// What the pointer shows of a mark is its attribute data-tip.
const tip = document.getElementById("tip");
addEventListener("mousemove", event => {
  const mark = event.target.closest ? event.target.closest("[data-tip]") : null;
  tip.style.display = mark ? "block" : "none";
  if (!mark) return;
  tip.textContent = mark.dataset.tip;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 6)) + "px";
  tip.style.top = (event.clientY + height + 22 > innerHeight ? event.clientY - height - 10 : event.clientY + 16) + "px";
});
addEventListener("scroll", () => { tip.style.display = "none"; }, true);
