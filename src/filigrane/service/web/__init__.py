"""The web page: the same service for people, in plain HTML.

    routes      what each address does, a module for each page
    answering   what every page does around its own work
    refusals    what browsers are told where no page could answer
    visits      who stands before a page
    sessions    who is logged in: a sealed cookie, no store
    forms       what a browser sent, read in memory and checked for where it came from
    questions   what forms that ask about a text have in common
    approvals   what forms of those who need a second person have in common
    rendering   templates, static files and the headers of every page
    heat        a text cut into pieces with their evidence
    words       codes of results in plain language

Every page works without JavaScript. It computes nothing of its own: what it shows comes from the
detector, the key book and the tracer, under the same roles as the HTTP API.
"""
