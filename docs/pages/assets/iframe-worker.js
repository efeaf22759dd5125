// Search in pages that are opened as files: browsers allow them no worker, so the search runs in a hidden frame.
// The theme's search asks for an object of this name (its "offline" plugin).
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      this.ready = false
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      this.frame = frame
      const inner = frame.contentDocument
      inner.open()
      inner.write("<!doctype html><body></body>")
      inner.close()
      const own = frame.contentWindow
      own.postMessage = data => {
        const answer = new MessageEvent("message", { data })
        this.dispatchEvent(answer)
        if (this.onmessage) this.onmessage(answer)
      }
      own.importScripts = (...urls) => urls.reduce((before, one) => before.then(() => add(one)), Promise.resolve())
      const add = one => new Promise((resolve, reject) => {
        const script = inner.createElement("script")
        script.src = one
        script.onload = resolve
        script.onerror = reject
        inner.body.appendChild(script)
      })
      add(new URL(url, document.baseURI).href).then(() => {
        this.ready = true
        this.waiting.splice(0).forEach(data => this.postMessage(data))
      })
    }

    postMessage(data) {
      if (this.ready) this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }))
      else this.waiting.push(data)
    }

    terminate() {
      this.frame.remove()
    }
  }
  window.Worker = window.IFrameWorker
}
