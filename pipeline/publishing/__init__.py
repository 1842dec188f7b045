"""Publishing a run on the Hub: what is sent (`files`, `card`), what must not be (`private`), and how (`hub`)."""
