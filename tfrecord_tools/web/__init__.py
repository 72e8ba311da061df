"""Images from the web: many requests at once in one process, polite to hosts, and deaf to what must not be reached.

- `settings`: how a process fetches, and the outcome that it gives for each row
- `fetcher`: the event loop that takes rows and starts requests, follows redirects, and tries again
- `calls`: a call's rows on their way, and the threads that handle their outcomes
- `hosts`: whose turn it is, and how many requests to have under way
- `request`: one request and its answer, in every way in which it can end
- `resolver`: names to checked addresses
- `addresses`: which addresses may be connected to
- `urls`: URLs as browsers read them
- `permissions`: what a host says about the use of its images
"""
