"""One module for each tab of the page; each lays out its parts and says what they do."""
