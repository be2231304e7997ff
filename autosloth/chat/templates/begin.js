(function begin(image, tries) {
  const root = image.closest(".as-chat"), screen = root && root.querySelector(".as-screen");
  if (!screen || !root.querySelector(".as-show")) return tries && setTimeout(begin, 100, image, tries - 1);
  const held = kind => [...root.querySelectorAll(".as-held " + kind)];
  let asking = false;
  for (const event of ["input", "change"]) root.addEventListener(event, change => {
    if (!asking && held("input").includes(change.target)) change.stopImmediatePropagation();
  }, true);
  root.addEventListener("click", click => {
    if (!click.target.closest(".as-ask")) return;
    asking = true;
    held("input").forEach(input => input.dispatchEvent(new Event("change", { bubbles: true })));
    asking = false;
  }, true);
  root.addEventListener("keydown", key => {
    if (key.key === "Enter" && held("input").includes(key.target)) { key.preventDefault(); key.stopPropagation(); root.querySelector(".as-ask").click(); }
  }, true);
  screen.querySelector("p").textContent = "Ask something. Nothing of it is kept in the notebook.";
  root.querySelector(".as-show").click();
})(this, 300)
