"""Tables and figures from results that are already there: no model is loaded here."""
