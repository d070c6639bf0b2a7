import torch, sys
import bitlinear
from bitlinear import ops, packing
torch.manual_seed(0)
OP=torch.ops.bitlinear.fused_linear; L=torch.ops.bitlinear.linear
d='cuda'
bad=0
for K in (1,5,64,192,640,1000,2560,6912,16384,20000,40000):
  for M in (1,3,9,40,200):
    for dt in (torch.float32,torch.bfloat16):
      for act in (None,"silu","relu2"):
        for norm in (False,True):
          Ns=(5,3,70)
          w=[packing.pack_ternary(torch.randint(-1,2,(n,K),dtype=torch.int8)).to(d) for n in Ns]
          s=[torch.rand(1,device=d),torch.rand(3,1,device=d),torch.rand(1,device=d)]
          b=[torch.randn(5,device=d),None,torch.randn(70,device=d).to(dt)]
          x=(torch.randn(M,K*(2 if act else 1),device=d)*3).to(dt)
          nw=torch.randn(K,device=d).to(dt) if norm else None
          r=torch.randn(M,78,device=d).to(dt)
          a=(x,w,s,b,K,1e-6,0,16 if M==3 else 8,act,nw,1e-5,r)
          c=lambda t: [c(i) for i in t] if isinstance(t,(list,tuple)) else t.cpu() if isinstance(t,torch.Tensor) else t
          y=OP(*a).cpu(); z=OP(*c(a))
          if not torch.equal(y,z): bad+=1; print(K,M,dt,act,norm,(y!=z).sum().item())
print("bad",bad)
def graph_time(f,n=20,reps=20):
    for _ in range(3): f()
    torch.cuda.synchronize()
    g=torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for _ in range(n): f()
    ts=[]
    for _ in range(reps):
        e0=torch.cuda.Event(enable_timing=True);e1=torch.cuda.Event(enable_timing=True)
        e0.record();g.replay();e1.record();torch.cuda.synchronize();ts.append(e0.elapsed_time(e1)*1e3/n)
    return sorted(ts)[len(ts)//2]
def mk(n,k,c): return [packing.pack_ternary(torch.randint(-1,2,(n,k),dtype=torch.int8)).to(d) for _ in range(c)]
H,I=2560,6912
one=[torch.ones(1,device=d)*0.01]
for M in (1,2,4,16,64,1024):
    x=torch.randn(M,H,device=d).bfloat16(); g2=torch.randn(M,2*I,device=d).bfloat16(); xi=torch.randn(M,I,device=d).bfloat16()
    nw=torch.ones(H,device=d).bfloat16(); nwi=torch.ones(I,device=d).bfloat16(); r=torch.randn(M,H,device=d).bfloat16()
    C=8
    q,k,v=mk(2560,H,C),mk(640,H,C),mk(640,H,C); o=mk(H,H,C); ga,up=mk(I,H,C),mk(I,H,C); dn=mk(H,I,C)
    def rep(f):
        return lambda: [f(i) for i in range(C)]
    res={}
    res['qkv norm']=graph_time(rep(lambda i: OP(x,[q[i],k[i],v[i]],one*3,[None]*3,H,1e-6,0,8,None,nw,1e-5)))/C
    res['qkv plain']=graph_time(rep(lambda i: OP(x,[q[i],k[i],v[i]],one*3,[None]*3,H)))/C
    res['q,k,v']=graph_time(rep(lambda i: [L(x,t[i],one[0],None,H) for t in (q,k,v)]))/C
    res['o norm res']=graph_time(rep(lambda i: OP(x,[o[i]],one,[None],H,1e-6,0,8,None,nw,1e-5,r)))/C
    res['o']=graph_time(rep(lambda i: L(x,o[i],one[0],None,H)))/C
    res['gu norm']=graph_time(rep(lambda i: OP(x,[ga[i],up[i]],one*2,[None]*2,H,1e-6,0,8,None,nw,1e-5)))/C
    res['g,u']=graph_time(rep(lambda i: [L(x,t[i],one[0],None,H) for t in (ga,up)]))/C
    res['down relu2 norm res']=graph_time(rep(lambda i: OP(g2,[dn[i]],one,[None],I,1e-6,0,8,"relu2",nwi,1e-5,r)))/C
    res['down silu res']=graph_time(rep(lambda i: OP(g2,[dn[i]],one,[None],I,1e-6,0,8,"silu",None,0,r)))/C
    res['down']=graph_time(rep(lambda i: L(xi,dn[i],one[0],None,I)))/C
    print(M,{a:round(t,2) for a,t in res.items()})
