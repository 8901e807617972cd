"""What the page does in the browser itself: the box, the copy button, the file of a conversation."""

# The box is emptied and filled within one step of the browser, never by an event's output: a letter that is
# typed while an output is under way would be lost.
WRITE = """
  const area = document.querySelector('#box textarea');
  const write = text => {
    area.value = text;
    area.dispatchEvent(new Event('input', {bubbles: true}));
  };
"""

# Enter, before gradio hears of it. No button to send, or a message that has no answer yet: the text stays.
ENTER = f"""
  window.sending = {{text: '', waits: false}};
  const take = () => {{
    {WRITE}
    const idle = document.querySelector('#box .submit-button') && !window.sending.waits;
    if (!idle || !area.value.trim()) return;
    window.sending = {{text: area.value, waits: true}};
    write('');
  }};
  document.addEventListener('keypress', event => {{
    if (event.key === 'Enter' && !event.shiftKey && event.target.matches?.('#box textarea')) take();
  }}, true);
  document.addEventListener('click', event => {{
    if (event.target.closest?.('#box .submit-button')) take();
  }}, true);
"""

# What was taken is on its way, as gradio's event says.
SEND = """() => {
  const text = window.sending.text, same = {__type__: 'update'};
  window.sending.text = '';
  if (!text) return [same, same];
  document.querySelector('#chat [role=log]')?.scrollTo(0, 1e9);
  return [{...same, submit_btn: false}, text];
}"""

# Whatever the page could not take (refused, no room in the queue, no server) is put back into the box.
PUT_BACK = f"""asked => {{
  {WRITE}
  if (asked) write([asked, area.value].filter(text => text).join('\\n'));
  return '';
}}"""
END = f"""asked => {{
  window.sending.waits = false;
  return [{{__type__: 'update', submit_btn: true, stop_btn: false}}, ({PUT_BACK})(asked)];
}}"""

# One row of training data: formats.py reads it as it is.
EXPORT = """(said, system) => {
  if (!said || !said.length) return [];
  const opening = system.trim() ? [{role: 'system', content: system.trim()}] : [];
  const text = JSON.stringify({messages: [...opening, ...said]}, null, 1);
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text + '\\n'], {type: 'application/json'}));
  link.download = `chat-${new Date().toISOString().slice(0, 19).replace(/:/g, '')}.json`;
  link.click();
  URL.revokeObjectURL(link.href);
  return [];
}"""

# What runs as the page opens.
# FOLLOW: the end of a reply stays in sight as it comes, until the reader scrolls up; back at the end, again.
# Gradio's own autoscroll jumps to the end 0.3 s after each piece: nobody could scroll up meanwhile.
# TIDY: a message is copied and edited as it was written, without the side's name and the escapes that
# page_messages.escape_markup put in. Only https and localhost have navigator.clipboard; elsewhere gradio
# copies out of a text area that nobody sees.
FOLLOW = """
  const follow = () => {
    const log = document.querySelector('#chat [role=log]');
    if (!log) return setTimeout(follow, 50);
    let atEnd = true, last = 0;
    log.addEventListener('scroll', () => {
      const below = log.scrollHeight - log.clientHeight - log.scrollTop;
      if (below < 2) atEnd = true;
      else if (log.scrollTop < last) atEnd = false;
      last = log.scrollTop;
    });
    new MutationObserver(() => { if (atEnd) log.scrollTop = log.scrollHeight; })
      .observe(log, {childList: true, subtree: true, characterData: true});
  };
  follow();
"""
TIDY = """
  const code = /(^ {0,3}```[^`\\n]*$[^]*?(?:^ {0,3}```|$(?![^]))|(?<![\\\\`])`[^`\\n]+`(?!`))/m;
  const plain = part => part.replace(/&lt;/g, '<').replace(/!&#91;/g, '![').replace(/&amp;/g, '&');
  const tidy = text => text.replace(/^<small class="side">.*?<\\/small>\\n\\n/, '')
    .split(code).map((part, i) => i % 2 ? part : plain(part)).join('');
  let ofMessage = false;
  document.addEventListener('click', event => {
    ofMessage = Boolean(event.target.closest?.('.message-buttons'));
    if (ofMessage) setTimeout(() => {
      const area = document.querySelector('#chat .edit-textarea:not([data-tidy])');
      if (!area) return;
      area.dataset.tidy = true;
      area.value = tidy(area.value);
      area.dispatchEvent(new Event('input', {bubbles: true}));
    });
  }, true);
  if (navigator.clipboard) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = text => write(ofMessage ? tidy(text) : text);
  } else document.addEventListener('copy', event => {
    const area = document.activeElement;
    if (!ofMessage || area?.style.left !== '-999999px') return;
    event.clipboardData.setData('text/plain', tidy(area.value));
    event.preventDefault();
  });
"""
OPEN = f"() => {{{ENTER}{FOLLOW}{TIDY}}}"
