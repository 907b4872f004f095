"""From labelled recordings to a probe with a report; serving never imports this package."""
