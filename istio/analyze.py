"""What Istio's CRD schema lets through and istiod or Envoy would not. Pure."""
