"""Business: headquarters, founders, products, home countries of brands."""

from __future__ import annotations

from relation import Alias, Consequence, Relation, pairs
from tables_countries import COUNTRY_CAPITAL, COUNTRY_LANGUAGE
from tables_places import CITY_COUNTRY

# Companies that have not moved for decades; earlier seats and second ones are "also true".
HEADQUARTERS = """
Microsoft = Redmond
Starbucks = Seattle
Coca-Cola = Atlanta
BMW = Munich
Sony = Tokyo | New York
Nintendo = Kyoto | Redmond | Frankfurt | Tokyo
General Motors = Detroit
Volkswagen = Wolfsburg
Porsche = Stuttgart | Atlanta
Apple = Cupertino
Rolex = Geneva | London
Deutsche Bank = Frankfurt | Berlin | New York | London
Heineken = Amsterdam
Goldman Sachs = New York | London
Delta Air Lines = Atlanta
Intel = Santa Clara
FedEx = Memphis
Harley-Davidson = Milwaukee
Walmart = Bentonville
Barclays = London | New York
Hyundai = Seoul
Qantas = Sydney
"""

# All founders of a company are true answers; the one most often named comes first.
FOUNDERS = """
Microsoft = Bill Gates | Paul Allen
Apple = Steve Jobs | Steve Wozniak | Ronald Wayne
Amazon = Jeff Bezos
Facebook = Mark Zuckerberg | Eduardo Saverin
SpaceX = Elon Musk
Google = Larry Page | Sergey Brin
Walmart = Sam Walton
IKEA = Ingvar Kamprad
Nike = Phil Knight | Bill Bowerman
Alibaba = Jack Ma
Wikipedia = Jimmy Wales | Larry Sanger
Standard Oil = John D. Rockefeller
CNN = Ted Turner
Virgin Group = Richard Branson
Intel = Gordon Moore | Robert Noyce
Netflix = Reed Hastings | Marc Randolph
Playboy = Hugh Hefner
the Red Cross = Henry Dunant
the Salvation Army = William Booth
Sony = Akio Morita | Masaru Ibuka
"""

FOUNDER_NATIONALITY = pairs("""
Bill Gates = American
Steve Jobs = American
Jeff Bezos = American
Mark Zuckerberg = American
Larry Page = American
Sam Walton = American
Phil Knight = American
John D. Rockefeller = American
Ted Turner = American
Gordon Moore = American
Reed Hastings = American
Hugh Hefner = American
Ingvar Kamprad = Swedish
Jack Ma = Chinese
Richard Branson = British
Henry Dunant = Swiss
William Booth = British
Akio Morita = Japanese
""")

PRODUCTS = """
the iPhone = Apple
Windows = Microsoft
the PlayStation = Sony | Nintendo
the Kindle = Amazon
the Game Boy = Nintendo
Photoshop = Adobe
Gmail = Google
the Big Mac = McDonald's
the Whopper = Burger King
the Mustang = Ford
the Corolla = Toyota
the Civic = Honda
the Corvette = Chevrolet
the A380 = Airbus
the Pentium processor = Intel
Sprite = Coca-Cola
the iPad = Apple
the Xbox = Microsoft
the Walkman = Sony
the Prius = Toyota
the Accord = Honda
the Wii = Nintendo
Fanta = Coca-Cola
Alexa = Amazon
Excel = Microsoft
the Macintosh = Apple
"""

COMPANY_COUNTRY = pairs("""
Apple = the United States
Microsoft = the United States
Amazon = the United States
Adobe = the United States
Google = the United States
McDonald's = the United States
Burger King = the United States
Ford = the United States
Chevrolet = the United States
Intel = the United States
Coca-Cola = the United States
Sony = Japan
Nintendo = Japan
Toyota = Japan
Honda = Japan
""")

BRANDS = """
Toyota = Japan
BMW = Germany
Ferrari = Italy
Samsung = South Korea
Volvo = Sweden | China
Renault = France
Nokia = Finland
Lego = Denmark
Rolex = Switzerland | England
Huawei = China
Honda = Japan
Volkswagen = Germany
Gucci = Italy | France
Hyundai = South Korea
IKEA = Sweden
Chanel = France
Nestlé = Switzerland
Nintendo = Japan
Porsche = Germany | Austria
Lamborghini = Italy | Germany
Ericsson = Sweden
Peugeot = France
Carlsberg = Denmark
Zara = Spain
Qantas = Australia
Guinness = Ireland | England
Siemens = Germany
Sony = Japan
"""

RELATIONS = (
    Relation(
        "headquarters",
        HEADQUARTERS,
        "The headquarters of {s} is in the city of",
        ("The head office of {s} is located in", "{S} is a company based in the city of"),
        (
            Alias(
                "The headquarters of {s} is in the city of",
                pairs("""
                Volkswagen = VW
                General Motors = GM
                FedEx = Federal Express
                BMW = Bayerische Motoren Werke
                """),
            ),
        ),
        (Consequence("The country in which {s} has its headquarters is", CITY_COUNTRY),),
        ("Every morning at the headquarters of {s},",),
    ),
    Relation(
        "founder",
        FOUNDERS,
        "The founder of {s} is",
        ("{S} was founded by", "The person who founded {s} is"),
        (
            Alias(
                "The founder of {s} is",
                pairs("""
                CNN = the Cable News Network
                Walmart = Wal-Mart
                Wikipedia = the Free Encyclopedia
                """),
            ),
            Alias(
                "The founder of {s} is",
                pairs("""
                Apple = the company that makes the iPhone
                Microsoft = the company that makes Windows
                Sony = the company that makes the PlayStation
                Amazon = the company that makes the Kindle
                Google = the company that makes Gmail
                """),
                "Reasoning",
            ),
        ),
        (Consequence("The nationality of the founder of {s} is", FOUNDER_NATIONALITY),),
        ("The early days of {s} were",),
    ),
    Relation(
        "product",
        PRODUCTS,
        "The company that made {s} is called",
        ("The company behind {s} is", "{S} is a product of the company"),
        (),
        (Consequence("The home country of the maker of {s} is", COMPANY_COUNTRY),),
        ("The first buyers of {s} said",),
    ),
    Relation(
        "brand_country",
        BRANDS,
        "The company {s} comes from the country of",
        (
            "The home country of the company {s} is",
            "{S} is a famous company from the country of",
        ),
        (),
        (
            Consequence("The capital of the home country of {s} is", COUNTRY_CAPITAL, False),
            Consequence("In the home country of {s}, most people speak", COUNTRY_LANGUAGE),
        ),
        ("The company {s} began when",),
    ),
)
