(function begin(image, tries) {
  const root = image.closest(".as-chat");
  if (!root || !root.querySelector(".as-show")) return tries && setTimeout(begin, 100, image, tries - 1);
  const held = () => [...root.querySelectorAll(".as-held input")];
  let asking = false;
  for (const event of ["input", "change"]) root.addEventListener(event, change => {
    if (!asking && held().includes(change.target)) change.stopImmediatePropagation();
  }, true);
  root.addEventListener("click", click => {
    if (!click.target.closest(".as-ask")) return;
    asking = true;
    held().forEach(input => input.dispatchEvent(new Event("change", { bubbles: true })));
    asking = false;
  }, true);
  root.addEventListener("keydown", key => {
    if (key.key !== "Enter" || !held().includes(key.target)) return;
    key.preventDefault();
    key.stopPropagation();
    root.querySelector(".as-ask").click();
  }, true);
  root.querySelector(".as-show").click();
})(this, 300)
