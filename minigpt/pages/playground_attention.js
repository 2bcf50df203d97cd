// Around the attention maps: as high as they are. They are a page of their own, which can only send its height.
window.addEventListener("message", event => {
  const frame = element.querySelector("iframe"), height = event.data?.height;
  if (frame && event.source === frame.contentWindow && Number.isFinite(height))
    frame.style.height = `${Math.max(200, Math.min(4000, height + 2))}px`;
});
