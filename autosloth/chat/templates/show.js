(function (image) {
  for (const screen of document.querySelectorAll("#" + image.dataset.screen)) {
    if (+image.dataset.number <= +(screen.dataset.number || 0)) continue;
    screen.dataset.number = image.dataset.number;
    screen.innerHTML = image.dataset.html;
    screen.scrollTop = screen.scrollHeight;
  }
})(this)
