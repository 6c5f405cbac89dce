"""Types of `kladi` are executed in tests: every annotated shape and dtype is checked at each call."""

from jaxtyping import install_import_hook

hook = install_import_hook("kladi", "beartype.beartype")
hook.__enter__()
