"""The web page: a thin layer over the library, in which every user keeps to folders of their own."""
