"""How we show it: a results file -> one offline HTML page. Imports no torch."""
