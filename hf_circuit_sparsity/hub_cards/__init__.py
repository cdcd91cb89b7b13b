"""Cards for the Hub: templates, and what renders plain facts into Markdown safely."""
