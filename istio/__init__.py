"""The decision in Istio's words: VirtualService, DestinationRule, ServiceEntry.

`render` makes objects of a plan, `analyze` finds what Istio's CRD schema lets through and istiod or Envoy would not,
`steps` says which write comes next; all three compute and do no I/O. `writer` does the writing.
"""
